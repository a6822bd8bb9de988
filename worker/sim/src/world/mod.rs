//! A job in virtual time: processes, their connections, and everything that happens to them, in the order of a queue.

mod faults;
mod joining;
mod links;
mod shards;
mod spoil;
mod training;
mod workers;

use crate::case::Case;
use crate::check::{Checker, LifeId, Violation, broken};
use crate::coverage::Coverage;
use crate::estimates::Estimates;
use crate::random::Random;
use crate::sabotage::Sabotage;
use crate::trace::Trace;
use crate::wires::{Connection, ConnectionId, End, Link, Packet, Stream};
use core::cmp::Reverse;
use core::time::Duration;
use shards::ShardProcess;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use workers::WorkerProcess;

pub(crate) use workers::OpenStep;

/// With no fault about, a job must move within this time, whatever happened last: a worker is lost (3 s until it is noticed,
/// 1 s of grace) or a shard is told everything again (3 s), and a step.
const STALL: Duration = Duration::from_secs(5);
/// After all faults are over, the job must come to its end within this time and what its steps take.
const SETTLE: Duration = Duration::from_secs(120);
/// Events of a run at most.
const MOST_EVENTS: u64 = 3_000_000;

/// Where a process lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Place {
    Shard(usize),
    Worker(usize),
}

/// What happens.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    /// A packet reaches an end.
    Arrive {
        connection: ConnectionId,
        end: End,
        stream: Stream,
        number: u64,
        packet: Packet,
    },
    /// A worker tries to reach a shard.
    Dial {
        life: LifeId,
        worker: usize,
        shard: usize,
    },
    /// Its attempt reaches the shard, or is over.
    Knock {
        life: LifeId,
        worker: usize,
        shard: usize,
    },
    /// A connection is looked at for silence.
    KeepAlive(ConnectionId),
    /// A machine's deadline.
    Timer { place: Place, token: u64 },
    /// The next tensor's gradient is there.
    Fill { life: LifeId, worker: usize },
    /// The trainer goes on after its update.
    Begin { life: LifeId, worker: usize },
    /// A replica arrives in a shard's store.
    Stored {
        life: LifeId,
        worker: usize,
        shard: usize,
    },
    /// A joiner's fetch ends.
    Fetched { life: LifeId, worker: usize },
    /// A process starts.
    Start(usize),
    /// A frozen process goes on.
    Thaw(Place),
    /// The fault of this number.
    Fault(usize),
    /// A new worker comes.
    NewWorker,
    /// The job is looked at.
    Watch,
}

/// A point in time, in the order of scheduling.
#[derive(Debug)]
struct Entry {
    at: Duration,
    order: u64,
    happening: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Random numbers by concern.
struct Randoms {
    network: Random,
    compute: Random,
    faults: Random,
    processes: Random,
    store: Random,
}

/// See the module.
pub struct World<'a> {
    case: &'a Case,
    sabotage: Option<Sabotage>,
    trace: &'a mut Trace,
    now: Duration,
    queue: BinaryHeap<Reverse<Entry>>,
    scheduled: u64,
    events: u64,
    randoms: Randoms,
    shards: Vec<ShardProcess>,
    workers: Vec<WorkerProcess>,
    connections: Vec<Connection>,
    links: BTreeMap<(usize, usize), Link>,
    checker: Checker,
    estimates: Estimates,
    coverage: Coverage,
    /// Answers that shards have sent: some faults wait for a number of them.
    answers: u64,
    spoiled: spoil::Spoiled,
    /// Faults that wait for a number of answers.
    waiting: VecDeque<(u64, usize)>,
    /// No fault is about from here on.
    disturbed_until: Duration,
    /// Some fault is about until then, but the job must go on.
    faults_until: Duration,
    /// Something passes in one direction only until then.
    one_way_until: Duration,
    /// When such faults end.
    ends: Vec<Duration>,
    /// The job last moved.
    moved: Duration,
    /// All faults are over.
    healed: Option<Duration>,
    lives: u64,
    /// Faults that have not struck yet.
    pending: usize,
    /// Workers that will come.
    coming: usize,
    /// Enough workers could go on since then.
    calm_since: Duration,
    frontier: u64,
    finished: bool,
}

impl<'a> World<'a> {
    /// The world before the first event.
    #[must_use]
    pub fn new(case: &'a Case, sabotage: Option<Sabotage>, trace: &'a mut Trace) -> Self {
        let random = |concern| Random::new(case.seed, concern);
        let mut world = Self {
            case,
            sabotage,
            trace,
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            scheduled: 0,
            events: 0,
            randoms: Randoms {
                network: random("network"),
                compute: random("compute"),
                faults: random("faults"),
                processes: random("processes"),
                store: random("store"),
            },
            shards: Vec::new(),
            workers: Vec::new(),
            connections: Vec::new(),
            links: BTreeMap::new(),
            checker: Checker::new(&case.plan, case.faults.is_empty() && case.quorum == 0),
            estimates: Estimates::default(),
            coverage: Coverage::default(),
            answers: 0,
            spoiled: spoil::Spoiled::new(),
            waiting: VecDeque::new(),
            disturbed_until: Duration::from_secs(2),
            faults_until: Duration::ZERO,
            one_way_until: Duration::ZERO,
            ends: Vec::new(),
            moved: Duration::ZERO,
            healed: None,
            lives: 0,
            pending: 0,
            coming: 0,
            calm_since: Duration::ZERO,
            frontier: 0,
            finished: false,
        };
        world.set_up();
        world
    }

    fn set_up(&mut self) {
        for shard in 0..usize::from(self.case.shards) {
            let process = self.new_shard(shard, 0);
            self.shards.push(process);
        }
        for _ in 0..self.case.world {
            let after = self
                .randoms
                .processes
                .time(Duration::ZERO..Duration::from_millis(500));
            self.schedule(after, Happening::NewWorker);
            self.coming += 1;
        }
        self.plan_faults();
        self.schedule(Duration::from_secs(1), Happening::Watch);
    }

    /// Runs until the job is done.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn run(&mut self) -> Result<(), Violation> {
        while !self.finished {
            let Some(Reverse(entry)) = self.queue.pop() else {
                return broken("I4 progress", "nothing happens any more");
            };
            self.events += 1;
            if self.events > MOST_EVENTS {
                return broken("I4 progress", "too many events");
            }
            self.now = entry.at;
            self.happen(entry.happening)?;
        }
        Ok(())
    }

    /// What was seen, once the run is over.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        let mut coverage = self.coverage.clone();
        coverage.add("events", self.events);
        coverage.add("virtual seconds", self.now.as_secs());
        coverage
    }

    fn schedule(&mut self, after: Duration, happening: Happening) {
        self.schedule_at(self.now + after, happening);
    }

    fn schedule_at(&mut self, at: Duration, happening: Happening) {
        self.scheduled += 1;
        self.queue.push(Reverse(Entry {
            at: at.max(self.now),
            order: self.scheduled,
            happening,
        }));
    }

    /// Whose business it is: a frozen process looks at it later.
    fn place_of(&self, happening: &Happening) -> Option<Place> {
        match happening {
            Happening::Arrive {
                connection, end, ..
            } => {
                let connection = &self.connections[connection.0];
                Some(match end {
                    End::Worker => Place::Worker(connection.worker),
                    End::Shard => Place::Shard(connection.shard),
                })
            }
            Happening::Timer { place, .. } => Some(*place),
            Happening::Knock { shard, .. } => Some(Place::Shard(*shard)),
            Happening::Dial { worker, .. }
            | Happening::Fill { worker, .. }
            | Happening::Begin { worker, .. }
            | Happening::Stored { worker, .. }
            | Happening::Fetched { worker, .. } => Some(Place::Worker(*worker)),
            _ => None,
        }
    }

    fn happen(&mut self, happening: Happening) -> Result<(), Violation> {
        if let Some(place) = self.place_of(&happening)
            && let Some(inbox) = self.frozen(place)
        {
            inbox.push_back(happening);
            return Ok(());
        }
        match happening {
            Happening::Arrive {
                connection,
                end,
                stream,
                number,
                packet,
            } => self.arrive(connection, end, stream, number, packet),
            Happening::Dial {
                life,
                worker,
                shard,
            } => {
                self.dial(life, worker, shard);
                Ok(())
            }
            Happening::Knock {
                life,
                worker,
                shard,
            } => self.knock(life, worker, shard),
            Happening::KeepAlive(connection) => self.keep_alive(connection),
            Happening::Timer {
                place: Place::Shard(shard),
                token,
            } => self.shard_timer(shard, token),
            Happening::Timer {
                place: Place::Worker(worker),
                token,
            } => self.worker_timer(worker, token),
            Happening::Fill { life, worker } => self.fill(life, worker),
            Happening::Begin { life, worker } => self.begin(life, worker),
            Happening::Stored {
                life,
                worker,
                shard,
            } => self.stored(life, worker, shard),
            Happening::Fetched { life, worker } => self.fetched(life, worker),
            Happening::Start(shard) => {
                self.start_shard(shard);
                Ok(())
            }
            Happening::NewWorker => {
                self.coming -= 1;
                self.new_worker();
                Ok(())
            }
            Happening::Thaw(place) => self.thaw(place),
            Happening::Fault(number) => self.strike(number),
            Happening::Watch => self.watch(),
        }
    }

    fn frozen(&mut self, place: Place) -> Option<&mut VecDeque<Happening>> {
        let (until, inbox) = match place {
            Place::Shard(at) => {
                let shard = &mut self.shards[at];
                (shard.frozen_until, &mut shard.inbox)
            }
            Place::Worker(at) => {
                let worker = &mut self.workers[at];
                (worker.frozen_until, &mut worker.inbox)
            }
        };
        until.map(|_| inbox)
    }

    fn note(&mut self, text: core::fmt::Arguments<'_>) {
        self.trace.line(self.now, text);
    }
}
