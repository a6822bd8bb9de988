//! What people see: a snapshot of the machine and what it remembers of the past, all of it bounded.

use super::event::{Observation, Outcome, Report, SessionId, Traffic};
use super::members::Waited;
use super::{Job, Life, Shard};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step};
use core::time::Duration;
use serde::Serialize;
use std::collections::VecDeque;

/// Lines of the journal that are kept.
const JOURNAL_LINES: usize = 40;
/// Points of the loss curve that are kept; beyond it every other one is dropped.
const LOSS_POINTS: usize = 512;

/// State of the membership.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// No worker is here.
    Empty,
    /// Shard 0 waits for the world to be complete.
    Gathering,
    /// It was restarted, and is told by the workers where the job is.
    Recovering,
    /// Steps go on.
    Running,
}

/// A snapshot for people and scripts. Units stand last in a name; byte counts are of frame bodies.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Status {
    /// Version of the program.
    pub version: &'static str,
    /// Index of this shard.
    pub shard: ShardId,
    /// Shards of the job.
    pub shards: u16,
    /// Job served.
    pub job: String,
    /// State of the membership.
    pub stage: Stage,
    /// Workers that make the job complete.
    pub world: u16,
    /// As many may be in it.
    pub max_workers: u16,
    /// As many are in it now: those that are away for a moment counted, those that wait for a place not.
    pub members_now: u16,
    /// Fewer end it.
    pub min_workers: u16,
    /// Membership's version.
    pub epoch: Epoch,
    /// Lowest step with an open bucket.
    pub step: Step,
    /// Update number of the newest step.
    pub update: Option<u64>,
    /// Seconds since the process started.
    pub uptime_seconds: f64,
    /// What is trained, and how; `None` without a job.
    pub plan: Option<PlanStatus>,
    /// Workers, by rank.
    pub members: Vec<MemberStatus>,
    /// Rounds that wait for someone (at most 64 are listed).
    pub open_rounds: Vec<OpenRound>,
    /// Sums since the process started.
    pub totals: Totals,
    /// Share of the sketch's energy in the chosen rows, newest sparse round.
    pub captured_energy: Option<f32>,
    /// Share of the compressible elements that travelled, newest round.
    pub density: Option<f32>,
    /// The parameters of all workers were compared before this step last; `None`: not in this job (shard 0 alone compares).
    pub digests_compared: Option<Step>,
    /// Training loss, mean over the workers that reported the step.
    pub loss: Vec<LossPoint>,
    /// What happened lately, oldest first.
    pub journal: Vec<JournalLine>,
}

/// The plan in numbers.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct PlanStatus {
    /// Tensors.
    pub tensors: usize,
    /// Elements of all tensors.
    pub elements: u64,
    /// Buckets.
    pub buckets: usize,
    /// Buckets of which this shard owns rows.
    pub buckets_here: usize,
    /// Settings.
    pub algorithm: AlgorithmConfig,
}

/// How a worker stands here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Rounds wait for it.
    Live,
    /// It gets its state, or replays what came since.
    Joining,
    /// It is connected here, but not to another shard.
    CutOff,
    /// Its connection is lost; it may come back.
    Away,
}

/// One worker.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MemberStatus {
    /// Session, while it is connected.
    pub session: Option<SessionId>,
    /// Rank, once given.
    pub rank: Option<Rank>,
    /// Host name and process id.
    pub host: String,
    /// How it stands.
    pub standing: Standing,
    /// The highest step that it is known to have come to.
    pub step: Step,
    /// Seconds since its first Hello.
    pub since_seconds: f64,
    /// Seconds for which the others waited for it, all phases together.
    pub waited_for_seconds: f64,
    /// Phases that closed without it (with a quorum).
    pub missed_phases: u64,
    /// Longest time by which a contribution of its came too late.
    pub worst_lateness_seconds: f64,
    /// It is late most of the time.
    pub straggling: bool,
    /// Its last report (only shard 0 gets them).
    pub report: Option<Report>,
}

/// A round that waits.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct OpenRound {
    /// Step.
    pub step: Step,
    /// Bucket.
    pub bucket: BucketId,
    /// Frame kind that it gathers.
    pub gathers: String,
    /// Ranks that are missing.
    pub missing: Vec<Rank>,
    /// Seconds since its first frame.
    pub open_seconds: f64,
}

/// Sums since the process started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Totals {
    /// Rounds closed with all workers.
    pub rounds_complete: u64,
    /// Rounds closed without some.
    pub rounds_partial: u64,
    /// Rounds that were skipped.
    pub rounds_non_finite: u64,
    /// Rounds that nobody waited for any more.
    pub rounds_abandoned: u64,
    /// Bodies received.
    pub received_bytes: Traffic,
    /// Bodies sent.
    pub sent_bytes: Traffic,
    /// Dense f32, one direction.
    pub dense_equivalent_bytes: u64,
    /// Peers refused.
    pub refused: u64,
    /// Workers lost.
    pub lost: u64,
}

/// Point of the loss curve.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct LossPoint {
    /// Step.
    pub step: Step,
    /// Mean over the workers that reported it.
    pub loss: f32,
}

/// Something that happened.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct JournalLine {
    /// Seconds since the process started.
    pub at_seconds: f64,
    /// What.
    pub text: String,
}

/// Memory of the past.
#[derive(Clone, Debug, Default)]
pub(super) struct Board {
    totals: Totals,
    captured_energy: Option<f32>,
    density: Option<f32>,
    loss: LossCurve,
    journal: VecDeque<JournalLine>,
}

#[derive(Clone, Debug, Default)]
struct LossCurve {
    points: Vec<LossPoint>,
    /// Every so many steps a point; a power of two.
    stride: u64,
    /// Step whose reports come in, their sum and number.
    current: Option<(Step, f64, u32)>,
}

impl LossCurve {
    /// Reports come in order of their steps; one that is late or false draws nothing.
    fn add(&mut self, step: Step, loss: f32) {
        if self.newest().is_some_and(|newest| step < newest.step) {
            return;
        }
        if let Some((current, sum, count)) = &mut self.current
            && *current == step
        {
            *sum += f64::from(loss);
            *count += 1;
            return;
        }
        if let Some(point) = self.newest() {
            let stride = self.stride.max(1);
            if point.step.0.is_multiple_of(stride) || self.points.is_empty() {
                self.points.push(point);
            }
        }
        if self.points.len() > LOSS_POINTS {
            self.stride = self.stride.max(1) * 2;
            let mut index = 0;
            self.points.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
        self.current = Some((step, f64::from(loss), 1));
    }

    fn newest(&self) -> Option<LossPoint> {
        self.current.map(|(step, sum, count)| LossPoint {
            step,
            loss: (sum / f64::from(count)) as f32,
        })
    }

    fn all(&self) -> Vec<LossPoint> {
        self.points.iter().copied().chain(self.newest()).collect()
    }
}

impl Board {
    pub(super) fn record<'a>(
        &mut self,
        now: Duration,
        observations: impl Iterator<Item = &'a Observation>,
    ) {
        for observation in observations {
            if let Some(text) = self.count(observation) {
                if self.journal.len() == JOURNAL_LINES {
                    self.journal.pop_front();
                }
                self.journal.push_back(JournalLine {
                    at_seconds: now.as_secs_f64(),
                    text,
                });
            }
        }
    }

    /// Counts, and gives the line for the journal, if it is worth one.
    fn count(&mut self, observation: &Observation) -> Option<String> {
        match observation {
            Observation::Joined {
                host, joined, rank, ..
            } => {
                // Shards other than 0 see no Started: the job begins with its first worker.
                if *joined == 1 && rank.is_some() {
                    self.loss = LossCurve::default();
                }
                let rank = rank.map_or(String::new(), |rank| format!(" as rank {rank}"));
                Some(format!("{host} joined{rank}; {joined} here"))
            }
            Observation::Started { world, step, .. } => {
                // A job that starts anew draws a new curve.
                self.loss = LossCurve::default();
                Some(format!(
                    "all {world} workers are here: starts at step {step}"
                ))
            }
            Observation::Left { rank, remaining } => {
                Some(format!("{} left; {remaining} remain", name(*rank)))
            }
            Observation::Lost {
                rank,
                reason,
                remaining,
            } => {
                self.totals.lost += 1;
                Some(format!(
                    "{} was lost: {reason}; {remaining} remain",
                    name(*rank)
                ))
            }
            Observation::Refused { detail, .. } => {
                self.totals.refused += 1;
                Some(format!("refused: {detail}"))
            }
            Observation::RoundClosed(round) => {
                let counter = match round.outcome {
                    Outcome::Complete => &mut self.totals.rounds_complete,
                    Outcome::Partial => &mut self.totals.rounds_partial,
                    Outcome::NonFinite => &mut self.totals.rounds_non_finite,
                    Outcome::Abandoned => &mut self.totals.rounds_abandoned,
                };
                *counter += 1;
                self.totals.received_bytes.add(round.received, 1);
                self.totals.sent_bytes.add(round.sent, 1);
                self.totals.dense_equivalent_bytes += round.dense_equivalent_bytes;
                self.captured_energy = round.captured_energy.or(self.captured_energy);
                self.density = round.density.or(self.density);
                (round.outcome == Outcome::NonFinite).then(|| {
                    format!(
                        "step {}, bucket {}: a gradient is not finite, all skip the update",
                        round.step, round.bucket
                    )
                })
            }
            Observation::Away { rank, reason } => Some(format!("rank {rank} is away: {reason}")),
            Observation::Returned { rank, seconds } => {
                Some(format!("rank {rank} is back after {seconds:.1} s"))
            }
            Observation::JoinedLater { rank, step } => {
                Some(format!("rank {rank} joins with a snapshot of step {step}"))
            }
            Observation::Recovering { members } => Some(format!(
                "a job of {members} workers is under way: they tell where it is"
            )),
            Observation::Recovered {
                step,
                told,
                members,
                adopted,
                seconds,
            } => Some(format!(
                "{told} of {members} workers have told everything: goes on at step {step} with {adopted} answers that they held, after {seconds:.1} s"
            )),
            Observation::Straggling { rank, persistent } => Some(if *persistent {
                format!(
                    "rank {rank} is late most of the time: look at its machine, or raise --straggler-timeout-seconds"
                )
            } else {
                format!("rank {rank} is in time again")
            }),
            Observation::DigestsDiffer { step, ranks } => Some(format!(
                "the parameters of ranks {ranks:?} differ from those of the most at step {step}"
            )),
            Observation::Adopted { .. } | Observation::Late { .. } | Observation::Waited { .. } => {
                None
            }
            Observation::Reported { report, .. } => {
                if report.loss.is_finite() {
                    self.loss.add(report.step, report.loss);
                }
                None
            }
            Observation::Emptied => Some("nobody is left: ready for another start".to_owned()),
        }
    }
}

fn name(rank: Option<Rank>) -> String {
    rank.map_or_else(
        || "a worker without a rank".to_owned(),
        |rank| format!("rank {rank}"),
    )
}

impl Shard {
    /// A snapshot for people.
    #[must_use]
    pub fn status(&self, now: Duration) -> Status {
        let job = self.job.as_ref();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            shard: self.config.shard,
            shards: self.config.shards,
            job: self.config.job.clone(),
            stage: match job.map(|job| &job.life) {
                None => Stage::Empty,
                Some(Life::Gathering) => Stage::Gathering,
                Some(Life::Recovering(_)) => Stage::Recovering,
                Some(Life::Running) => Stage::Running,
            },
            world: self.config.world,
            max_workers: self.config.max_workers.max(self.config.world),
            members_now: job.map_or(0, |job| job.members.count() as u16),
            min_workers: self.config.min_workers,
            epoch: job.map_or(Epoch(0), |job| job.members.epoch),
            step: job.map_or(Step(0), |job| job.rounds.step()),
            update: job.and_then(|job| job.rounds.update()),
            uptime_seconds: now.as_secs_f64(),
            plan: job.map(PlanStatus::of),
            members: self.member_statuses(now),
            open_rounds: job.map_or_else(Vec::new, |job| open_rounds(job, now)),
            totals: self.board.totals,
            captured_energy: self.board.captured_energy,
            density: self.board.density,
            digests_compared: job.and_then(|job| job.digests.compared()),
            loss: self.board.loss.all(),
            journal: self.board.journal.iter().cloned().collect(),
        }
    }

    fn member_statuses(&self, now: Duration) -> Vec<MemberStatus> {
        let Some(job) = &self.job else {
            return Vec::new();
        };
        let members = job.members.iter().map(|(rank, m)| MemberStatus {
            session: m.session(),
            rank: Some(rank),
            host: m.host.clone(),
            standing: match (m.session(), m.waited) {
                (None, _) => Standing::Away,
                (_, Waited::From(_)) => Standing::Live,
                (_, Waited::Joining) => Standing::Joining,
                (_, Waited::CutOff) => Standing::CutOff,
            },
            step: m.step,
            since_seconds: now.saturating_sub(m.since).as_secs_f64(),
            waited_for_seconds: m.waited_for_seconds,
            missed_phases: m.lateness.missed,
            worst_lateness_seconds: m.lateness.worst.as_secs_f64(),
            straggling: m.lateness.persistent,
            report: m.report,
        });
        let applicants = job.applicants.iter().map(|applicant| MemberStatus {
            session: Some(applicant.session),
            rank: None,
            host: applicant.host.clone(),
            standing: Standing::Joining,
            step: Step(0),
            since_seconds: 0.0,
            waited_for_seconds: 0.0,
            missed_phases: 0,
            worst_lateness_seconds: 0.0,
            straggling: false,
            report: None,
        });
        members.chain(applicants).collect()
    }
}

impl PlanStatus {
    fn of(job: &Job) -> Self {
        Self {
            tensors: job.plan.tensors.len(),
            elements: job.plan.tensors.iter().map(|t| t.elements as u64).sum(),
            buckets: job.plan.buckets.len(),
            buckets_here: job.rounds.buckets_here(),
            algorithm: job.plan.spec.algorithm.clone(),
        }
    }
}

fn open_rounds(job: &Job, now: Duration) -> Vec<OpenRound> {
    let open = job.rounds.open().take(64);
    open.map(|(step, bucket, round)| OpenRound {
        step,
        bucket,
        gathers: format!("{:?}", round.gathers()).to_lowercase(),
        missing: job
            .members
            .live(now, step)
            .into_iter()
            .filter(|rank| !round.has(*rank))
            .collect(),
        open_seconds: now.saturating_sub(round.opened).as_secs_f64(),
    })
    .collect()
}
