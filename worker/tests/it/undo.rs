//! Steps that do not end: whatever had come, feedback state is what it was, to the bit. Beside a model that keeps U apart.
#![allow(
    unsafe_code,
    reason = "lending is a promise about memory, which the tests keep"
)]

use crate::support::{
    algorithm, bits, fingerprint, gradients, model, noise, spec, state, step, tensor,
};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::compress::reference::Reference;
use arc_topk_common::compress::{Kernels, ProjectionKey, ValueCodec};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Feedback, ValueType};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec, Segment, TensorPlan};
use arc_topk_worker::backend::{
    Backend, CpuBackend, Gradient, Lent, LoadPass, Piece, PieceValues, SegmentCommit, SentRows,
    on_cpu,
};
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use core::ops::Range;
use core::ptr::NonNull;
use proptest::prelude::*;
use std::sync::Arc;

const RULES: [Feedback; 4] = [
    Feedback::None,
    Feedback::Ef14,
    Feedback::Ef21,
    Feedback::Ef21m,
];
const F32: ValueCodec = ValueCodec {
    value_type: ValueType::F32,
    quant_block: 64,
};
const DECAY: f32 = 0.9;
const ETA: f32 = 0.3;

fn kernels(reference: bool) -> Arc<dyn Kernels> {
    if reference {
        Arc::new(Reference)
    } else {
        Arc::new(Fast)
    }
}

/// Two matrices and a vector; of the first a shard has a part that is written past the caches.
fn job(feedback: Feedback, padded: bool) -> PlanSpec {
    let rule = AlgorithmConfig {
        feedback_decay: DECAY,
        eta: ETA,
        // There is no place for the last row's padding in the gradient's own memory.
        block_width: if padded { 25 } else { 0 },
        ..algorithm(feedback, 0.3)
    };
    let tensors = vec![
        tensor("large", &[801, 93]),
        tensor("small", &[7, 9]),
        tensor("bias", &[40]),
    ];
    spec(rule, 2, tensors)
}

/// A seeded source of choices.
struct Choices(u64);

impl Choices {
    fn one_in(&mut self, n: u64) -> bool {
        self.0 += 1;
        (((noise(self.0) + 1.0) * 1e6) as u64).is_multiple_of(n)
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        self.0 += 1;
        let from = self.0 << 24;
        (0..len as u64).map(|i| noise(from + i)).collect()
    }
}

/// One tensor as ALGORITHM's rules say it, U beside the state.
struct Naive {
    feedback: Feedback,
    width: usize,
    keeps_late: bool,
    e: Vec<f32>,
    v: Vec<f32>,
    h: Vec<f32>,
    global: Vec<f32>,
    late: Vec<f32>,
    u: Vec<f32>,
    result: Vec<f32>,
}

/// How a segment's round ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Counted,
    Missed,
    Abstained,
    /// ef21: H is made anew.
    Restored {
        counted: bool,
    },
}

impl Naive {
    fn new(tensor: &TensorPlan, feedback: Feedback) -> Self {
        let zeros = vec![0.0; tensor.rows * tensor.width];
        let of = |rules: &[Feedback]| {
            if tensor.sparse && rules.contains(&feedback) {
                zeros.clone()
            } else {
                Vec::new()
            }
        };
        Self {
            feedback: if tensor.sparse {
                feedback
            } else {
                Feedback::None
            },
            width: tensor.width,
            keeps_late: !tensor.sparse && feedback == Feedback::Ef14,
            e: of(&[Feedback::Ef14]),
            v: of(&[Feedback::Ef21m]),
            h: of(&[Feedback::Ef21, Feedback::Ef21m]),
            global: of(&[Feedback::Ef21, Feedback::Ef21m]),
            late: zeros.clone(),
            u: zeros.clone(),
            result: zeros,
        }
    }

    fn load(&mut self, gradient: &[f32], dense: bool) {
        for i in 0..self.u.len() {
            let g = gradient.get(i).copied().unwrap_or(0.0);
            self.u[i] = match self.feedback {
                Feedback::Ef14 => g + DECAY * self.e[i],
                Feedback::Ef21m if !dense => (1.0 - ETA) * self.v[i] + ETA * g,
                _ if self.late[i] == 0.0 => g,
                _ => g + self.late[i],
            };
        }
    }

    /// A of the chosen elements.
    fn input(&self, elements: &[usize], dense: bool) -> Vec<f32> {
        let a = |i: &usize| {
            if dense || self.h.is_empty() {
                self.u[*i]
            } else {
                self.u[*i] - self.h[*i]
            }
        };
        elements.iter().map(a).collect()
    }

    /// `sent` and `mean` are of the elements `chosen`.
    fn end(
        &mut self,
        all: Range<usize>,
        chosen: &[usize],
        dense: bool,
        end: End,
        sent: &[f32],
        mean: &[f32],
    ) {
        let counted = matches!(end, End::Counted | End::Restored { counted: true });
        if let End::Restored { .. } = end {
            self.global[all.clone()].copy_from_slice(mean);
        } else {
            self.move_on(all.clone(), chosen, dense, end, sent, mean);
        }
        if self.h.is_empty() {
            self.result[all].fill(0.0);
            chosen
                .iter()
                .zip(mean)
                .for_each(|(i, x)| self.result[*i] = *x);
        } else {
            if !counted {
                self.h[all.clone()].copy_from_slice(&self.global[all.clone()]);
            }
            self.result[all.clone()].copy_from_slice(&self.global[all]);
        }
    }

    fn move_on(
        &mut self,
        all: Range<usize>,
        chosen: &[usize],
        dense: bool,
        end: End,
        sent: &[f32],
        mean: &[f32],
    ) {
        let counted = end == End::Counted;
        if end != End::Abstained {
            let kept = match self.feedback {
                Feedback::Ef14 => Some(&mut self.e),
                Feedback::Ef21m => Some(&mut self.v),
                _ => self.keeps_late.then_some(&mut self.late),
            };
            if let Some(kept) = kept {
                kept[all.clone()].copy_from_slice(&self.u[all]);
            }
        }
        for (at, i) in chosen.iter().enumerate() {
            match self.feedback {
                Feedback::Ef14 if counted => self.e[*i] -= sent[at],
                Feedback::None if counted && self.keeps_late => self.late[*i] = 0.0,
                Feedback::Ef21 | Feedback::Ef21m => {
                    if counted {
                        let before = if dense { 0.0 } else { self.h[*i] };
                        self.h[*i] = before + sent[at];
                    }
                    let before = if dense { 0.0 } else { self.global[*i] };
                    self.global[*i] = before + mean[at];
                }
                _ => {}
            }
        }
    }

    /// What [`Backend::export`] should give.
    fn export(&self) -> Vec<(&'static str, Vec<u32>)> {
        let late = if self.late.iter().any(|x| *x != 0.0) {
            &self.late[..]
        } else {
            &[]
        };
        let arrays = [
            ("residual", &self.e[..]),
            ("momentum", &self.v),
            ("local", &self.h),
            ("global", &self.global),
            ("residual", late),
        ];
        let arrays = arrays.into_iter().filter(|(_, values)| !values.is_empty());
        arrays.map(|(name, values)| (name, bits(values))).collect()
    }
}

/// How a step ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    /// Segments as they fall.
    Commit,
    /// Skipped: abandoned, and the memory is given back later or now.
    Skip { keeps_loans: bool },
    /// The next one begins as if nothing had been loaded.
    LoadAgain,
    /// A checkpoint's state comes.
    Import,
}

/// The backend and the model, side by side.
struct Bench {
    plan: Plan,
    backend: CpuBackend,
    naive: Vec<Naive>,
    /// Memory that is lent, by tensor.
    memory: Vec<Vec<f32>>,
    choices: Choices,
}

impl Bench {
    fn new(feedback: Feedback, padded: bool, reference: bool, seed: u64) -> Self {
        let plan = Plan::build(job(feedback, padded)).unwrap();
        let backend = CpuBackend::new(&plan, kernels(reference));
        let naive = plan
            .tensors
            .iter()
            .map(|t| Naive::new(t, feedback))
            .collect();
        let memory = vec![Vec::new(); plan.tensors.len()];
        Self {
            plan,
            backend,
            naive,
            memory,
            choices: Choices(seed << 32),
        }
    }

    /// The state is as the model has it, and so it can be seen at any time.
    fn check(&self, when: &str) {
        for (id, naive) in (0..).map(TensorId).zip(&self.naive) {
            let got = self.backend.export(id).into_iter();
            let got: Vec<_> = got.map(|(name, values)| (name, bits(&values))).collect();
            assert!(got == naive.export(), "state of {id:?} {when}");
        }
    }

    /// Hands one tensor over: lent, copied or absent. Returns whether all of it is finite.
    fn load(&mut self, id: TensorId, dense_round: bool) -> bool {
        let tensor = &self.plan.tensors[id.index()];
        let mut gradient = self.choices.values(tensor.elements);
        let spoilt = self.choices.one_in(6);
        if spoilt {
            gradient[tensor.elements / 2] = f32::NAN;
        }
        let dense_round = dense_round || !tensor.sparse;
        let key = ProjectionKey {
            seed: 1,
            tensor: id.0,
            step: self.choices.0,
        };
        let pass = LoadPass {
            dense_round,
            sketch: (!dense_round).then_some(key),
            measure: self.choices.one_in(2),
        };
        if self.choices.one_in(5) {
            self.naive[id.index()].load(&[], dense_round);
            self.backend.load(id, Gradient::Absent, pass);
            return true;
        }
        self.naive[id.index()].load(&gradient, dense_round);
        if self.choices.one_in(2) {
            self.backend.load(id, Gradient::F32(&gradient), pass);
            return !spoilt;
        }
        // What was lent before is the backend's until it has been told of this one.
        let mut before = core::mem::replace(&mut self.memory[id.index()], gradient);
        let memory = &mut self.memory[id.index()];
        let address = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: the test looks at the memory only where the backend has ended the loan.
        let lent = unsafe { Lent::new(address, memory.len()) };
        self.backend.load(id, Gradient::Lent(lent), pass);
        before.fill(f32::NAN);
        !spoilt
    }

    /// A step of which some tensors come.
    fn step(&mut self, dense_round: bool, ending: Ending) {
        let loaded: Vec<Option<bool>> = (0..self.plan.tensors.len() as u32)
            .map(|id| {
                let comes = !self.choices.one_in(4);
                comes.then(|| self.load(TensorId(id), dense_round))
            })
            .collect();
        self.check("in an open step");
        match ending {
            Ending::Commit => self.commit(dense_round, &loaded),
            Ending::Skip { keeps_loans } => {
                self.backend.abandon();
                if keeps_loans {
                    // Nothing of the state lies there any more.
                    self.scribble();
                }
                self.check("after a skipped step");
            }
            Ending::LoadAgain => return,
            Ending::Import => self.import(),
        }
        self.backend.give_back();
        self.scribble();
        self.check("after everything was given back");
    }

    fn scribble(&mut self) {
        self.memory
            .iter_mut()
            .for_each(|memory| memory.fill(f32::NAN));
    }

    fn commit(&mut self, dense_round: bool, loaded: &[Option<bool>]) {
        let segments = self
            .plan
            .buckets
            .iter()
            .flat_map(|b| b.segments.iter().flatten());
        for segment in segments.copied().collect::<Vec<_>>() {
            self.commit_segment(segment, dense_round, loaded[segment.tensor.index()]);
        }
        self.check("after a commit");
        for (tensor, naive) in self.plan.tensors.iter().zip(&self.naive) {
            let got = bits(self.backend.result(tensor.id));
            assert!(
                got == bits(&naive.result[..tensor.elements]),
                "result of {:?}",
                tensor.id
            );
        }
    }

    fn commit_segment(&mut self, segment: Segment, dense_round: bool, loaded: Option<bool>) {
        let tensor = &self.plan.tensors[segment.tensor.index()];
        let dense_round = dense_round || !tensor.sparse;
        let naive = &mut self.naive[segment.tensor.index()];
        let choices = &mut self.choices;
        let end = if !naive.h.is_empty() && choices.one_in(5) {
            End::Restored {
                counted: choices.one_in(2),
            }
        } else if loaded != Some(true) || choices.one_in(5) {
            End::Abstained
        } else if choices.one_in(3) {
            End::Missed
        } else {
            End::Counted
        };
        let whole = dense_round || matches!(end, End::Restored { .. });
        let rows: Vec<u32> = (segment.row_start..segment.row_end)
            .filter(|_| whole || choices.one_in(3))
            .collect();
        let width = naive.width;
        let chosen: Vec<usize> = rows
            .iter()
            .flat_map(|row| *row as usize * width..(*row as usize + 1) * width)
            .collect();
        let mean = choices.values(chosen.len());
        let (mut mean_bytes, mut sent_bytes) = (Vec::new(), Vec::new());
        F32.encode(&mean, &mut mean_bytes);
        let sent = naive.input(&chosen, dense_round);
        if end == End::Counted {
            let values = if dense_round {
                PieceValues::All
            } else {
                PieceValues::Rows(&rows)
            };
            self.backend.encode(
                &[Piece {
                    segment,
                    values,
                    codec: F32,
                }],
                &mut sent_bytes,
            );
            let mut expected = Vec::new();
            F32.encode(&sent, &mut expected);
            assert!(sent_bytes == expected, "values of {segment:?}");
        }
        let all = segment.row_start as usize * width..segment.row_end as usize * width;
        naive.end(all, &chosen, dense_round, end, &sent, &mean);
        if let End::Restored { counted } = end {
            self.backend.restore(segment, F32, &mean_bytes, counted);
            return;
        }
        self.backend.commit(&[SegmentCommit {
            segment,
            dense_round,
            rows: if dense_round {
                SentRows::All
            } else {
                SentRows::Some(&rows)
            },
            sent: (end == End::Counted).then_some(&sent_bytes[..]),
            abstained: end == End::Abstained,
            codec_up: F32,
            mean: &mean_bytes,
            codec_down: F32,
            measure: end != End::Abstained && self.choices.one_in(2),
        }]);
    }

    /// Every array becomes another, while a step is open.
    fn import(&mut self) {
        for (id, naive) in (0..).map(TensorId).zip(&mut self.naive) {
            for (name, len) in self.backend.state_lengths(id) {
                let values = self.choices.values(len);
                self.backend.import(id, name, &values);
                let array = match name {
                    "residual" => &mut naive.e,
                    "momentum" => &mut naive.v,
                    "local" => &mut naive.h,
                    _ => &mut naive.global,
                };
                *array = values;
            }
        }
        self.backend.abandon();
        self.check("after an import");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_course_of_steps_is_that_of_a_model_that_keeps_u_apart(
        feedback in prop::sample::select(RULES.to_vec()), padded: bool, reference: bool, seed in 0u64..1 << 30,
        steps in prop::collection::vec((prop::bool::weighted(0.25), prop_oneof![
            4 => Just(Ending::Commit),
            2 => any::<bool>().prop_map(|keeps_loans| Ending::Skip { keeps_loans }),
            1 => Just(Ending::LoadAgain),
            1 => Just(Ending::Import),
        ]), 1..8),
    ) {
        let mut bench = Bench::new(feedback, padded, reference, seed);
        for (dense_round, ending) in steps {
            bench.step(dense_round, ending);
        }
    }
}

/// What happens to a step that does not end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Abandoned,
    BegunAgain,
    Skipped,
}

/// Lends or copies some gradients of the first worker.
fn hand_over(job: &mut MemoryCluster, own: &mut [Vec<f32>], lends: bool) {
    for (id, gradient) in (0..).map(TensorId).zip(own) {
        let gradient = if lends {
            let address = NonNull::new(gradient.as_mut_ptr()).unwrap();
            // SAFETY: the gradients outlive the loan, and nobody looks at them before it ends.
            Gradient::Lent(unsafe { Lent::new(address, gradient.len()) })
        } else {
            Gradient::F32(gradient)
        };
        job.push(Rank(0), id, gradient).unwrap();
    }
}

fn arrays(job: &MemoryCluster) -> Vec<(String, Vec<u32>)> {
    let arrays = state(job, 0).arrays.into_iter();
    arrays.map(|(name, values)| (name, bits(&values))).collect()
}

/// A job of one worker on some loops.
fn on(reference: bool, spec: &PlanSpec) -> MemoryCluster {
    let options = MemoryOptions {
        backend: on_cpu(kernels(reference)),
        ..MemoryOptions::default()
    };
    MemoryCluster::new(spec.clone(), 1, &options).unwrap()
}

/// Begins a step of which the first tensors come, and breaks it off. Their memory then holds something else.
fn break_off(job: &mut MemoryCluster, spec: &PlanSpec, tensors: usize, lends: bool, fate: Fate) {
    let before = arrays(job);
    let mut own = gradients(spec, 1, 77).remove(0);
    if fate == Fate::Skipped {
        own[0][3] = f32::INFINITY;
    }
    job.begin();
    hand_over(job, &mut own[..tensors], lends);
    assert_eq!(arrays(job), before, "in an open step");
    match fate {
        Fate::Abandoned => job.worker_mut(Rank(0)).unwrap().abandon(),
        Fate::BegunAgain => job.begin(),
        Fate::Skipped => assert!(job.finish().unwrap()[0].unwrap().skipped),
    }
    own.iter_mut().for_each(|gradient| gradient.fill(f32::NAN));
    assert_eq!(arrays(job), before, "{fate:?}, {tensors} tensors");
}

#[test]
fn a_step_that_does_not_end_leaves_the_state_as_it_was() {
    for feedback in [Feedback::Ef14, Feedback::Ef21m] {
        let spec = spec(algorithm(feedback, 0.3), 2, model());
        for (reference, lends) in [(false, false), (false, true), (true, false), (true, true)] {
            for fate in [Fate::Abandoned, Fate::BegunAgain, Fate::Skipped] {
                for tensors in [1, spec.tensors.len()] {
                    let mut job = on(reference, &spec);
                    step(&mut job, &gradients(&spec, 1, 0));
                    break_off(&mut job, &spec, tensors, lends, fate);
                }
            }
        }
    }
}

#[test]
fn a_job_goes_on_as_if_a_step_that_was_broken_off_had_not_begun() {
    for feedback in [Feedback::Ef14, Feedback::Ef21m] {
        let rule = AlgorithmConfig {
            bucket_bytes: 1 << 20,
            ..algorithm(feedback, 0.3)
        };
        let spec = spec(rule, 2, model());
        for (lends, fate) in [
            (false, Fate::Abandoned),
            (true, Fate::Abandoned),
            (true, Fate::BegunAgain),
        ] {
            let (mut job, mut undisturbed) = (on(false, &spec), on(false, &spec));
            for number in 0..4 {
                // All but one: nothing has been sent.
                let most = spec.tensors.len() - 1;
                break_off(&mut job, &spec, most, lends, fate);
                for job in [&mut job, &mut undisturbed] {
                    step(job, &gradients(&spec, 1, number));
                }
                assert_eq!(fingerprint(&job, 1), fingerprint(&undisturbed, 1));
            }
        }
    }
}

/// Without a step that is open there is nothing to abandon: results stay.
#[test]
fn a_committed_step_is_not_abandoned() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let mut job = on(false, &spec);
    step(&mut job, &gradients(&spec, 1, 0));
    let before = fingerprint(&job, 1);
    job.worker_mut(Rank(0)).unwrap().abandon();
    assert_eq!(fingerprint(&job, 1), before);
}
