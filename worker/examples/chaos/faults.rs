//! The schedule of faults, and what each costs.

use super::AnyError;
use super::job::Job;
use super::lab::Lab;
use super::timeline::longest_gap;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(6);
const CUT: Duration = Duration::from_secs(8);
/// By then everybody takes part again, or something is wrong.
const HEALS_WITHIN: Duration = Duration::from_secs(60);
/// Live steps of each worker after which a fault is over.
const OVER_AFTER: usize = 3;
/// No fault begins with fewer steps left.
const LAST_STEPS: u64 = 60;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Fault {
    Worker,
    Coordinator,
    Shard,
    Two,
    WhileHealing,
    Pause,
    Add,
    Remove,
    CutLink,
    CutShard,
    Upgrade,
}

/// One turn of all faults, of which some come more than once.
const DECK: [Fault; 18] = [
    Fault::Worker,
    Fault::Worker,
    Fault::Worker,
    Fault::Coordinator,
    Fault::Coordinator,
    Fault::Shard,
    Fault::Shard,
    Fault::Two,
    Fault::Two,
    Fault::Two,
    Fault::Two,
    Fault::WhileHealing,
    Fault::WhileHealing,
    Fault::WhileHealing,
    Fault::Pause,
    Fault::Add,
    Fault::Remove,
    Fault::CutLink,
];

impl Fault {
    /// For the table.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Worker => "kill -9 of a worker",
            Self::Coordinator => "kill -9 of shard 0 (less the time until it is ready)",
            Self::Shard => "kill -9 of another shard (less the time until it is ready)",
            Self::Two => "kill -9 of two at once (less the time until a shard is ready)",
            Self::WhileHealing => {
                "kill -9, and another within 5 s (less the time until a shard is ready)"
            }
            Self::Pause => "a worker stands still for 6 s (SIGSTOP)",
            Self::Add => "a worker is added",
            Self::Remove => "a worker leaves",
            Self::CutLink => "a worker cut off from one shard for 8 s (of the others)",
            Self::CutShard => "a shard cut off from everybody for 8 s (less these)",
            Self::Upgrade => "a shard is replaced (SIGTERM, then started again 0.2 s later)",
        }
    }
}

/// What happened to whom.
struct Blow {
    at: Instant,
    /// Since when it can heal.
    over: Instant,
    targets: Vec<usize>,
    /// Time in which nobody can go on.
    excused: Duration,
}

pub(crate) struct Chaos {
    rng: ChaCha8Rng,
    deck: Vec<Fault>,
    cuts: bool,
    /// Shards that were replaced.
    upgraded: usize,
    pub(crate) wanted: usize,
    pub(crate) kills: usize,
    /// Seconds for which steps stalled.
    pub(crate) stalls: BTreeMap<Fault, Vec<f64>>,
    /// Faults after which not all took part again in time.
    pub(crate) unhealed: usize,
}

impl Chaos {
    pub(crate) fn new(seed: u64, kills: usize, cuts: bool) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            deck: Vec::new(),
            cuts,
            upgraded: 0,
            wanted: kills,
            kills: 0,
            stalls: BTreeMap::new(),
            unhealed: 0,
        }
    }

    /// One fault after the other, until enough processes were killed, the steps run out or it is `last`.
    pub(crate) fn run(
        &mut self,
        job: &mut Job<'_>,
        lab: &Lab,
        last: Instant,
    ) -> Result<(), AnyError> {
        if !job.await_all(Instant::now(), 20, HEALS_WITHIN)? {
            return Err(format!("the job does not get going: {}", job.describe()).into());
        }
        while self.kills < self.wanted && job.steps_left() >= LAST_STEPS && Instant::now() < last {
            let fault = self.draw();
            self.inflict(fault, job, lab)?;
        }
        Ok(())
    }

    /// Replaces all shards, one after the other, each once all take part again: what a rolling upgrade does.
    pub(crate) fn upgrade(&mut self, job: &mut Job<'_>, lab: &Lab) -> Result<(), AnyError> {
        job.await_all(Instant::now(), 20, HEALS_WITHIN)?;
        (0..job.shards()).try_for_each(|_| self.inflict(Fault::Upgrade, job, lab))
    }

    /// Makes the pool as large as it was at the start, so that what follows is the work of as many workers.
    pub(crate) fn make_up(&mut self, job: &mut Job<'_>, workers: usize) -> Result<(), AnyError> {
        while job.steps_left() >= LAST_STEPS && job.workers().len() != workers {
            let there = job.workers();
            if there.len() < workers {
                if job.add()?.is_none() {
                    break;
                }
            } else {
                job.remove(there[there.len() - 1]);
            }
            let healed = job.await_all(Instant::now(), OVER_AFTER, HEALS_WITHIN)?;
            self.unhealed += usize::from(!healed);
        }
        Ok(())
    }

    /// Kills without waiting for anything to heal, one every `pause` on average, as long as two workers take part.
    pub(crate) fn rain(
        &mut self,
        job: &mut Job<'_>,
        pause: Duration,
        last: Instant,
    ) -> Result<(), AnyError> {
        job.await_all(Instant::now(), 20, HEALS_WITHIN)?;
        while self.kills < self.wanted && job.steps_left() >= LAST_STEPS && Instant::now() < last {
            let share = self.below(2000) as u32;
            job.pump(pause * share / 1000)?;
            let ready = job.ready();
            let workers = ready.iter().filter(|index| **index >= job.shards());
            let spared = workers.count() <= 2;
            let may = |index: &usize| *index < job.shards() || !spared;
            let among: Vec<usize> = ready.iter().copied().filter(may).collect();
            if !among.is_empty() {
                let target = self.pick(&among);
                self.kill(job, &[target]);
                let (step, name) = (job.newest_step(), job.name(target));
                eprintln!("chaos: step {step}: kill {} [{name}]", self.kills);
            }
        }
        let healed = job.await_all(Instant::now(), OVER_AFTER, HEALS_WITHIN)?;
        self.unhealed += usize::from(!healed);
        Ok(())
    }

    /// One fault after some quiet time, and what it cost.
    pub(crate) fn inflict(
        &mut self,
        fault: Fault,
        job: &mut Job<'_>,
        lab: &Lab,
    ) -> Result<(), AnyError> {
        let quiet = Duration::from_millis(300 + self.below(500) as u64);
        job.pump(quiet)?;
        if job.steps_left() > 0 {
            let blow = self.strike(fault, job, lab)?;
            let healed = job.await_all(blow.over, OVER_AFTER, HEALS_WITHIN)?;
            if job.steps_left() > 0 {
                self.judge(fault, &blow, healed, job);
            }
        }
        Ok(())
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.rng.next_u64() % bound.max(1) as u64) as usize
    }

    fn pick(&mut self, among: &[usize]) -> usize {
        among[self.below(among.len())]
    }

    fn draw(&mut self) -> Fault {
        if self.deck.is_empty() {
            self.deck = DECK.to_vec();
            if self.cuts {
                self.deck.push(Fault::CutShard);
            } else {
                self.deck.retain(|fault| *fault != Fault::CutLink);
            }
        }
        let at = self.below(self.deck.len());
        self.deck.swap_remove(at)
    }

    fn strike(&mut self, fault: Fault, job: &mut Job<'_>, lab: &Lab) -> Result<Blow, AnyError> {
        let workers = job.workers();
        let worker = self.pick(&workers);
        let shards: Vec<usize> = (0..job.shards()).collect();
        let shard = self.pick(&shards);
        let everybody: Vec<usize> = shards.iter().chain(&workers).copied().collect();
        let at = Instant::now();
        let mut excused = Duration::ZERO;
        let targets = match fault {
            Fault::Worker => self.kill(job, &[worker]),
            Fault::Coordinator => self.kill(job, &[0]),
            Fault::Shard => {
                let other = self.pick(&shards[1..]);
                self.kill(job, &[other])
            }
            Fault::Two => {
                let one = self.pick(&everybody);
                let others: Vec<usize> = everybody
                    .iter()
                    .copied()
                    .filter(|other| *other != one)
                    .collect();
                let other = self.pick(&others);
                self.kill(job, &[one, other])
            }
            Fault::WhileHealing => {
                let (one, other) = (self.pick(&everybody), self.pick(&everybody));
                self.kill(job, &[one]);
                let pause = Duration::from_millis(self.below(5000) as u64);
                job.pump(pause)?;
                self.kill(job, &[other]);
                vec![one, other]
            }
            Fault::Pause => {
                job.signal(worker, Signal::STOP);
                let done = job.pump(PAUSE);
                job.signal(worker, Signal::CONT);
                done?;
                vec![worker]
            }
            Fault::Add => job.add()?.into_iter().collect(),
            Fault::Remove => {
                job.remove(worker);
                vec![worker]
            }
            Fault::CutLink => {
                lab.cut(worker, shard)?;
                job.pump(CUT)?;
                lab.mend()?;
                vec![worker]
            }
            Fault::Upgrade => {
                let next = self.upgraded % job.shards();
                self.upgraded += 1;
                job.replace(next);
                vec![next]
            }
            Fault::CutShard => {
                workers
                    .iter()
                    .try_for_each(|worker| lab.cut(shard, *worker))?;
                job.pump(CUT)?;
                lab.mend()?;
                excused = at.elapsed();
                Vec::new()
            }
        };
        eprintln!(
            "chaos: step {}: {} [{}]",
            job.newest_step(),
            fault.words(),
            targets
                .iter()
                .map(|index| job.name(*index))
                .collect::<Vec<_>>()
                .join(", ")
        );
        Ok(Blow {
            at,
            over: Instant::now(),
            targets,
            excused,
        })
    }

    fn kill(&mut self, job: &mut Job<'_>, targets: &[usize]) -> Vec<usize> {
        for target in targets {
            self.kills += usize::from(job.kill(*target));
        }
        targets.to_vec()
    }

    fn judge(&mut self, fault: Fault, blow: &Blow, healed: bool, job: &Job<'_>) {
        if !healed {
            self.unhealed += 1;
            eprintln!(
                "chaos: not all take part {} s later: {}",
                HEALS_WITHIN.as_secs(),
                job.describe()
            );
        }
        // The whole price of an upgrade is of interest, and it begins with a shard's goodbye.
        let excuses = |target: &&usize| **target < job.shards() && fault != Fault::Upgrade;
        let restarted = blow.targets.iter().filter(excuses);
        let down = restarted.map(|shard| job.downtime(*shard)).max();
        let excused = down.unwrap_or(blow.excused);
        let survivors = job
            .workers()
            .into_iter()
            .filter(|index| !blow.targets.contains(index));
        let gaps =
            survivors.filter_map(|index| longest_gap(job.steps_of(index), blow.at, Instant::now()));
        if let Some(gap) = gaps.max() {
            let stall = gap
                .saturating_sub(job.median_step())
                .saturating_sub(excused);
            self.stalls
                .entry(fault)
                .or_default()
                .push(stall.as_secs_f64());
            eprintln!(
                "chaos:   stalled {:.2} s, {} kills so far",
                stall.as_secs_f64(),
                self.kills
            );
        }
    }
}
