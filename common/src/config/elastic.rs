//! What a job does when machines come, go or lag.

use super::algorithm::{AlgorithmConfig, Feedback};
use super::setting::{SettingError, require};
use crate::wire::MAX_WORLD;
use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use serde::Serialize;

/// How many workers may come, and how long the others wait for a slow one. Told to shards; equal on all of them.
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "When machines come, go or lag")]
pub struct ElasticArgs {
    /// Most workers of the job, counting those that join while it runs; 0 for as many as --workers, so that a lost worker
    /// can be replaced, but the job does not grow.
    #[arg(long, value_name = "N", env = "ARC_MAX_WORKERS", default_value_t = 0)]
    pub max_workers: u16,
    /// A round may close once so many workers have contributed, --straggler-timeout-seconds later; 0 waits for all. What
    /// comes too late stays in that worker's residual and is sent with its next gradient. Not with ef21 and ef21m.
    #[arg(long, value_name = "N", env = "ARC_QUORUM", default_value_t = 0)]
    pub quorum: u16,
    /// Seconds that a round waits for the slowest workers after --quorum of them have contributed. Set it well above
    /// the usual spread of step times: a worker that is late in every step trains for nobody.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ARC_STRAGGLER_TIMEOUT_SECONDS",
        default_value_t = 1.0
    )]
    pub straggler_timeout_seconds: f64,
    /// Lets workers whose parameters differ from those of the most (see --digest-every) join again with a copy of the
    /// others'. Without it the difference is only reported: it has a cause, which this would hide. Where no more workers
    /// than --min-workers are left it is only reported, too: without one of them the job would end.
    #[arg(long, env = "ARC_RESYNC", value_parser = FalseyValueParser::new())]
    pub resync: bool,
}

impl Default for ElasticArgs {
    fn default() -> Self {
        Self {
            max_workers: 0,
            quorum: 0,
            straggler_timeout_seconds: 1.0,
            resync: false,
        }
    }
}

impl ElasticArgs {
    /// Most workers of a job that starts with `workers`.
    #[must_use]
    pub fn most_workers(&self, workers: u16) -> u16 {
        self.max_workers.max(workers)
    }

    /// Checks ranges for a job that starts with `workers`.
    ///
    /// # Errors
    /// The first setting outside its range.
    pub fn validate(&self, workers: u16) -> Result<(), SettingError> {
        let most = self.max_workers;
        let advice =
            "it is how many workers there may be at once; 0 takes as many as the job starts with";
        require(
            most == 0 || (most >= workers && usize::from(most) <= MAX_WORLD),
            "max_workers",
            most,
            "0, or from workers to 4096",
            advice,
        )?;
        let advice = "it is how many contributions close a round when the others are late; 0 waits for all of them";
        require(
            self.quorum <= self.most_workers(workers),
            "quorum",
            self.quorum,
            "0 to max_workers",
            advice,
        )?;
        let seconds = self.straggler_timeout_seconds;
        let advice = "it is how long a round waits beyond its quorum; twice the usual spread of step times is a good start";
        require(
            (0.0..=3600.0).contains(&seconds),
            "straggler_timeout_seconds",
            seconds,
            "0 to 3600",
            advice,
        )
    }

    /// Checks that the feedback rule bears a round without some of the workers.
    ///
    /// # Errors
    /// With a quorum under ef21 or ef21m, whose H must be the mean of all workers' estimates.
    pub fn validate_with(&self, algorithm: &AlgorithmConfig) -> Result<(), SettingError> {
        let keeps_estimates = matches!(algorithm.feedback, Feedback::Ef21 | Feedback::Ef21m);
        let advice = "under ef21 and ef21m every round needs all workers, since H is the mean of all their estimates; \
                      leave --quorum at 0, or use --feedback ef14";
        require(
            self.quorum == 0 || !keeps_estimates,
            "quorum",
            self.quorum,
            "0 with this feedback rule",
            advice,
        )
    }
}

/// What becomes of a local job's process that dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It is started again, and takes part again; one that dies too often is given up.
    #[default]
    OnFailure,
    /// The others go on without it.
    Never,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut ElasticArgs)) -> ElasticArgs {
        let mut args = ElasticArgs::default();
        change(&mut args);
        args
    }

    #[test]
    fn defaults_fit_every_world() {
        for workers in [1, 4, 4096] {
            ElasticArgs::default().validate(workers).unwrap();
        }
        assert_eq!(ElasticArgs::default().most_workers(4), 4);
        assert_eq!(with(|args| args.max_workers = 9).most_workers(4), 9);
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let cases: [(&str, ElasticArgs); 5] = [
            ("max_workers", with(|args| args.max_workers = 3)),
            ("max_workers", with(|args| args.max_workers = 5000)),
            ("quorum", with(|args| args.quorum = 5)),
            (
                "straggler_timeout_seconds",
                with(|args| args.straggler_timeout_seconds = -1.0),
            ),
            (
                "straggler_timeout_seconds",
                with(|args| args.straggler_timeout_seconds = f64::NAN),
            ),
        ];
        for (name, args) in cases {
            assert_eq!(args.validate(4).unwrap_err().name, name, "{args:?}");
        }
    }

    #[test]
    fn estimates_need_all_workers() {
        let quorum = with(|args| args.quorum = 3);
        for (feedback, fits) in [
            (Feedback::Ef14, true),
            (Feedback::None, true),
            (Feedback::Ef21, false),
            (Feedback::Ef21m, false),
        ] {
            let algorithm = AlgorithmConfig {
                feedback,
                ..AlgorithmConfig::default()
            };
            assert_eq!(quorum.validate_with(&algorithm).is_ok(), fits);
            ElasticArgs::default().validate_with(&algorithm).unwrap();
        }
    }
}
