//! The first mismatch of two plans, in words.

use super::{DType, PlanSpec, TensorSpec};
use crate::config::AlgorithmConfig;
use clap::ValueEnum;
use core::fmt;

/// First setting or tensor in which two specs differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlanDifference {
    /// What differs, such as `density` or `tensor 3: name`.
    pub what: String,
    /// Its value in the spec that was asked.
    pub here: String,
    /// Its value in the other spec.
    pub there: String,
}

impl fmt::Display for PlanDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} here, {} there", self.what, self.here, self.there)
    }
}

/// A setting as people write it.
trait Shown {
    fn shown(&self) -> String;
}

macro_rules! shown_by_display {
    ($($t:ty),*) => { $(impl Shown for $t { fn shown(&self) -> String { self.to_string() } })* };
}
macro_rules! shown_by_choice {
    ($($t:ident),*) => { $(impl Shown for crate::config::algorithm::$t {
        fn shown(&self) -> String {
            self.to_possible_value().map_or_else(|| format!("{self:?}"), |v| v.get_name().to_owned())
        }
    })* };
}
shown_by_display!(f32, u16, u32, u64);
shown_by_choice!(
    Compressor,
    Feedback,
    Init,
    ProjectionKind,
    SelectionPolicy,
    ValueType
);

impl Shown for DType {
    fn shown(&self) -> String {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
        .to_owned()
    }
}

fn differ<T: Shown + PartialEq>(
    what: impl Into<String>,
    here: &T,
    there: &T,
) -> Option<PlanDifference> {
    (here != there).then(|| PlanDifference {
        what: what.into(),
        here: here.shown(),
        there: there.shown(),
    })
}

impl PlanSpec {
    /// First difference to `other`: settings before tensors, tensors in order. `None` if both give the same plan.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<PlanDifference> {
        self.algorithm
            .first_difference(&other.algorithm)
            .or_else(|| first_trainer_difference(&self.trainer, &other.trainer))
            .or_else(|| differ("shards", &self.shards, &other.shards))
            .or_else(|| first_tensor_difference(&self.tensors, &other.tensors))
    }
}

impl AlgorithmConfig {
    /// First setting in which two configurations differ.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<PlanDifference> {
        macro_rules! first_of {
            ($($field:ident),* $(,)?) => {{
                // Destructured so that a new setting cannot be forgotten here.
                let Self { $($field),* } = self;
                None $(.or_else(|| differ(stringify!($field), $field, &other.$field)))*
            }};
        }
        first_of!(
            compressor,
            feedback,
            init,
            eta,
            feedback_decay,
            density,
            energy,
            sketch_rank,
            projection,
            selection,
            block_width,
            dense_below_elements,
            wire_up,
            wire_down,
            wire_sketch,
            wire_dense,
            wire_warmup,
            quant_block,
            warmup_updates,
            ramp_updates,
            seed,
            bucket_bytes,
        )
    }
}

/// First of the lines `name=value` in which two trainers differ.
fn first_trainer_difference(here: &str, there: &str) -> Option<PlanDifference> {
    if here == there {
        return None;
    }
    let (mut ours, mut theirs) = (here.lines(), there.lines());
    loop {
        let (our, their) = (ours.next(), theirs.next());
        if our != their {
            let parts = |line: Option<&str>| {
                let (name, value) = line.unwrap_or_default().split_once('=').unwrap_or_default();
                (name.to_owned(), value.to_owned())
            };
            let ((name, here), (other, there)) = (parts(our), parts(their));
            let what = if name.is_empty() { other } else { name };
            return Some(PlanDifference { what, here, there });
        }
        our?;
    }
}

fn first_tensor_difference(here: &[TensorSpec], there: &[TensorSpec]) -> Option<PlanDifference> {
    let common = here.iter().zip(there).enumerate();
    common
        .map(|(at, (a, b))| tensor_difference(at, a, b))
        .find_map(|d| d)
        .or_else(|| {
            let missing = here.get(there.len()).or_else(|| there.get(here.len()))?;
            Some(PlanDifference {
                what: format!(
                    "number of tensors (the first that only one side has is {:?})",
                    missing.name
                ),
                here: here.len().to_string(),
                there: there.len().to_string(),
            })
        })
}

fn tensor_difference(at: usize, a: &TensorSpec, b: &TensorSpec) -> Option<PlanDifference> {
    if a.name != b.name {
        let (here, there) = (format!("{:?}", a.name), format!("{:?}", b.name));
        return Some(PlanDifference {
            what: format!("tensor {at}: name"),
            here,
            there,
        });
    }
    let named = |field: &str| format!("tensor {at} {:?}: {field}", a.name);
    if a.shape != b.shape {
        let (here, there) = (format!("{:?}", a.shape), format!("{:?}", b.shape));
        return Some(PlanDifference {
            what: named("shape"),
            here,
            there,
        });
    }
    differ(named("dtype"), &a.dtype, &b.dtype).or_else(|| {
        let shown = |d: Option<f32>| d.map_or_else(|| "the job's".to_owned(), |d| d.to_string());
        let (here, there) = (shown(a.density), shown(b.density));
        (a.density != b.density).then(|| PlanDifference {
            what: named("density"),
            here,
            there,
        })
    })
}
