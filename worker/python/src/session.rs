//! The class `Session`: a worker's place in a job.

use super::errors::{ConnectionFailed, connecting, reducing};
use super::gpu::Gpu;
use super::options::Options;
use super::tensor::Memory;
use arc_topk_common::ids::{Step, TensorId};
use arc_topk_worker::reducer::{Reducer, StepStart, TrainReport};
use arc_topk_worker::session::{NetEvent, QuicReducer};
use arc_topk_worker::step::{RowsCame, StepOutcome, WorkerState};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

/// How often Python may interrupt what waits.
const SIGNALS: Duration = Duration::from_millis(100);

/// What came of a step.
#[pyclass(frozen, get_all, module = "arc_topk._native")]
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// The step that ended.
    step: u64,
    /// Its update number (skipped ones not counted).
    update: u64,
    /// Some worker's gradient was not finite: nothing changed, there is no result.
    skipped: bool,
    /// Share of the rows that travelled; 1 in dense rounds.
    density: f64,
    /// Share of the gradient's energy that came; `None` where it was not measured.
    captured_energy: Option<f32>,
    /// Bytes to the shards, and what of them dense training would have sent.
    bytes_sent: u64,
    bytes_received: u64,
    dense_equivalent_bytes: u64,
    /// Seconds of compression, and for which `finish` waited for the shards.
    compress_seconds: f64,
    wait_seconds: f64,
    /// Rounds of the step, and those in which this worker was counted.
    rounds: u64,
    rounds_counted: u64,
}

#[pymethods]
impl Outcome {
    fn __repr__(&self) -> String {
        format!("{self:?}")
    }
}

impl From<&StepOutcome> for Outcome {
    fn from(outcome: &StepOutcome) -> Self {
        let stats = &outcome.stats;
        Self {
            step: outcome.step.0,
            update: outcome.update,
            skipped: outcome.skipped,
            density: f64::from(stats.density),
            captured_energy: stats.captured_energy,
            bytes_sent: stats.sent.total(),
            bytes_received: stats.received.total(),
            dense_equivalent_bytes: stats.dense_equivalent_bytes,
            compress_seconds: stats.compress_seconds,
            wait_seconds: stats.wait_seconds,
            rounds: stats.rounds as u64,
            rounds_counted: stats.rounds_counted as u64,
        }
    }
}

/// Step, update, and arrays of little-endian f32 by name.
type Exported<'py> = (u64, u64, Vec<(String, Bound<'py, PyBytes>)>);

/// Where a result goes: `(tensor, address, elements, dtype)`.
type Target = (u32, usize, usize, String);

/// Fresh rows of each tensor of the last step: `None` for all of them.
type Rows = Vec<Option<Vec<u32>>>;

struct Held {
    /// Dropped before the tensors that it was lent.
    reducer: QuicReducer,
    /// Where tensors are on one.
    gpu: Option<Gpu>,
    rows: Rows,
    /// Holds the tensors that the reducer works in.
    lent: Vec<Py<PyAny>>,
    /// Where they lie: starts, and ends.
    spans: BTreeMap<usize, usize>,
}

impl Held {
    /// The reducer gives back what it was lent; who held it may let go of it.
    fn give_back(&mut self) -> Vec<Py<PyAny>> {
        if !self.reducer.give_back() {
            return Vec::new();
        }
        self.spans.clear();
        std::mem::take(&mut self.lent)
    }

    /// Forgets the open step: the tensors that it was lent are not needed to go back. Not on a GPU, where nothing of the state lies in
    /// them, and where they are read until the device has come so far.
    fn abandon(&mut self) -> Vec<Py<PyAny>> {
        if self.gpu.is_some() {
            return Vec::new();
        }
        self.reducer.abandon();
        self.give_back()
    }

    /// Holds what is being lent. Each place can be lent once: the reducer changes it.
    fn claim(&mut self, owner: Py<PyAny>, address: usize, bytes: usize) -> PyResult<()> {
        let end = address.saturating_add(bytes);
        let before = self.spans.range(..end).next_back();
        if before.is_some_and(|(_, other)| *other > address) {
            return Err(super::errors::config(
                "two gradients of a step lie in the same memory: give each its own, by clone()",
            ));
        }
        if bytes > 0 {
            self.spans.insert(address, end);
        }
        self.lent.push(owner);
        Ok(())
    }

    /// Where the results of each tensor go.
    fn targets(&self, tensors: Vec<Target>) -> PyResult<Vec<Vec<Memory>>> {
        let mut wanted = vec![Vec::new(); self.rows.len()];
        for (tensor, address, elements, dtype) in tensors {
            let memory = Memory::new(address, elements, &dtype)?;
            let of: &mut Vec<Memory> = wanted
                .get_mut(tensor as usize)
                .ok_or_else(|| super::errors::config(format!("there is no tensor {tensor}")))?;
            of.push(memory);
        }
        Ok(wanted)
    }
}

/// A worker's place in a job. One step is `begin`, `lend` for every tensor, `finish`, `results`.
#[pyclass(frozen, module = "arc_topk._native")]
pub(crate) struct Session {
    held: Mutex<Option<Held>>,
}

/// What is logged while this worker waits for a place: level and text.
type Line = (&'static str, String);

fn joining_line(event: &NetEvent) -> Option<Line> {
    match event {
        NetEvent::Waiting { joined, world } if joined > world => Some((
            "warning",
            format!(
                "the job is full, with {world} workers: waiting until one leaves; raise --max-workers of all shards for more"
            ),
        )),
        NetEvent::Waiting { joined, world } => Some((
            "info",
            format!(
                "waiting for a place in the job: {joined} of {world} workers are there, this one counted"
            ),
        )),
        NetEvent::Retrying { shard, cause } => Some((
            "info",
            format!("shard {shard} does not answer yet, and is tried again: {cause}"),
        )),
        _ => None,
    }
}

fn log(py: Python<'_>, (level, text): &Line) -> PyResult<()> {
    let logger = py
        .import("logging")?
        .call_method1("getLogger", ("arc_topk",))?;
    logger.call_method1(*level, ("%s", text)).map(drop)
}

/// Little-endian f32 from Python.
fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<4>();
    let values = values.iter();
    values.map(|value| f32::from_le_bytes(*value)).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    fn lock(&self) -> MutexGuard<'_, Option<Held>> {
        // A panic leaves the reducer as it was: its own steps are all or nothing.
        lock(&self.held)
    }

    /// Calls `f` without the interpreter's lock.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&mut Held) -> PyResult<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| match &mut *self.lock() {
            Some(held) => f(held),
            None => Err(ConnectionFailed::new_err(
                "this session has ended: call arc_topk.init() and register again",
            )),
        })
    }
}

#[pymethods]
impl Session {
    /// Joins the job that `options`, a JSON object, describes, and waits until all workers are there.
    #[new]
    fn new(py: Python<'_>, options: &str) -> PyResult<Self> {
        let options = Options::parse(options)?;
        let (mut net, spec, backend) = (options.net()?, options.plan()?, options.backend());
        let gpu = options.gpu().map(Gpu::open).transpose()?;
        let (news, told) = mpsc::channel();
        net.observer = Some(Arc::new(move |event: &NetEvent| {
            if let Some(line) = joining_line(event) {
                // Nobody listens once it has joined.
                let _joined = news.send(line);
            }
        }));
        let (done, result) = mpsc::channel();
        let result = Mutex::new(result);
        // On a thread of its own, so that Ctrl-C ends the waiting.
        let joining = std::thread::Builder::new().name("arc-join".into());
        joining
            .spawn(move || {
                let _interrupted = done.send(QuicReducer::connect_with(net, spec, &backend));
            })
            .map_err(|cause| ConnectionFailed::new_err(cause.to_string()))?;
        let mut last = None;
        let connected = loop {
            let came = py.detach(|| lock(&result).recv_timeout(SIGNALS));
            for line in told.try_iter() {
                if last.as_ref() != Some(&line) {
                    log(py, &line)?;
                    last = Some(line);
                }
            }
            match came {
                Ok(connected) => break connected,
                Err(mpsc::RecvTimeoutError::Timeout) => py.check_signals()?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(ConnectionFailed::new_err("joining the job panicked"));
                }
            }
        };
        let reducer = connected.map_err(|error| connecting(&error))?;
        let rows = vec![None; reducer.plan().tensors.len()];
        Ok(Self {
            held: Mutex::new(Some(Held {
                reducer,
                gpu,
                rows,
                lent: Vec::new(),
                spans: BTreeMap::new(),
            })),
        })
    }

    /// Rank in the job.
    fn rank(&self, py: Python<'_>) -> PyResult<u16> {
        self.with(py, |held| Ok(held.reducer.rank().0))
    }

    /// Ranks that are in the job now.
    fn members(&self, py: Python<'_>) -> PyResult<Vec<u16>> {
        self.with(py, |held| {
            let members = Reducer::members(&held.reducer);
            Ok(members.into_iter().map(|rank| rank.0).collect())
        })
    }

    /// Whether this worker does what one must do for all.
    fn is_leader(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |held| Ok(held.reducer.is_leader()))
    }

    /// Name of this start of the job, 32 hexadecimal digits.
    fn run(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |held| {
            let run = held.reducer.run().unwrap_or_default();
            Ok(run.0.iter().map(|byte| format!("{byte:02x}")).collect())
        })
    }

    /// First step of this worker.
    fn start_step(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |held| Ok(held.reducer.start_step().0))
    }

    /// Whether this worker must take another one's state before its first step, because it joined a job that runs.
    fn needs_snapshot(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |held| Ok(held.reducer.needs_snapshot().is_some()))
    }

    /// Whether a worker that joins needs a copy of this one's state. Ask between steps, after the results were applied.
    fn donation_due(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |held| Ok(held.reducer.donation_due()))
    }

    /// A copy of the state before `step` is made and is being put into the store.
    fn donating(&self, py: Python<'_>, step: u64) -> PyResult<()> {
        self.with(py, |held| {
            held.reducer.donating(Step(step));
            Ok(())
        })
    }

    /// The copy is in the store, or could not be put there.
    fn donation_ended(&self, py: Python<'_>, step: u64, stored: bool) -> PyResult<()> {
        self.with(py, |held| {
            held.reducer.donation_ended(Step(step), stored);
            Ok(())
        })
    }

    /// Elements of a row of each tensor, in the plan's view.
    fn widths(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        self.with(py, |held| {
            let tensors = held.reducer.plan().tensors.iter();
            Ok(tensors.map(|tensor| tensor.width as u64).collect())
        })
    }

    /// Opens a step. True: the job has closed it without this worker, so that no gradients are needed.
    fn begin(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |held| {
            held.spans.clear();
            let StepStart { behind } = held.reducer.begin().map_err(|e| reducing(&e))?;
            Ok(behind)
        })
    }

    /// Hands over a tensor's gradient: `elements` contiguous elements of float32 at `address`, which is in the memory of `owner`.
    /// The reducer works there until the results are taken, which then lie there. An error ends the step.
    fn lend(
        &self,
        py: Python<'_>,
        tensor: u32,
        owner: Py<PyAny>,
        address: usize,
        elements: usize,
    ) -> PyResult<()> {
        let lent = Memory::new(address, elements, "float32")?.lend();
        let (pushed, given_back) = self.with(py, move |held| {
            let pushed = held.claim(owner, address, elements * size_of::<f32>());
            let pushed = pushed.and_then(|()| {
                let pushed = match lent {
                    Some(lent) => held.reducer.lend(TensorId(tensor), lent),
                    None => held.reducer.push(TensorId(tensor), &[]),
                };
                pushed.map_err(|error| reducing(&error))
            });
            let given_back = if pushed.is_err() {
                held.abandon()
            } else {
                Vec::new()
            };
            Ok((pushed, given_back))
        })?;
        // Here, where the interpreter's lock is held.
        drop(given_back);
        pushed
    }

    /// Forgets the open step, if there is one: what was lent is given back, and feedback state is as it was before.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        let lent = self.with(py, |held| Ok(held.abandon()))?;
        drop(lent);
        Ok(())
    }

    /// Hands over a gradient that lies on the GPU: `elements` contiguous elements of `dtype` at `address`, in the memory of
    /// `owner`, there once `stream` (a `cudaStream_t`) has come so far. The result takes its place.
    #[allow(
        clippy::too_many_arguments,
        reason = "Python passes a tensor in pieces"
    )]
    fn lend_on_device(
        &self,
        py: Python<'_>,
        tensor: u32,
        owner: Py<PyAny>,
        address: usize,
        elements: usize,
        dtype: &str,
        stream: u64,
    ) -> PyResult<()> {
        let memory = Memory::new(address, elements, dtype)?;
        self.with(py, move |held| {
            held.claim(owner, address, memory.bytes())?;
            let gpu = held.gpu.as_mut();
            let gpu = gpu.ok_or_else(|| super::errors::config("this session has no GPU"))?;
            let gradient = gpu.gradient(&memory, stream)?;
            held.reducer
                .lend_on_device(TensorId(tensor), gradient)
                .map_err(|error| reducing(&error))
        })
    }

    /// Waits until every round of the step has closed, and commits.
    fn finish(&self, py: Python<'_>) -> PyResult<Outcome> {
        let (outcome, lent) = self.with(py, |held| {
            let outcome = held.reducer.finish();
            let lent = match &outcome {
                Ok(outcome) if !outcome.skipped => Vec::new(),
                Ok(_) => held.give_back(),
                Err(_) => held.abandon(),
            };
            Ok((outcome, lent))
        })?;
        // Here, where the interpreter's lock is held.
        drop(lent);
        Ok(Outcome::from(&outcome.map_err(|error| reducing(&error))?))
    }

    /// Writes results, times `factor`, to tensors: `(tensor, address, elements, dtype)` of each. What was lent is given back.
    ///
    /// Results of `on_device`, tensors that were lent there, lie in their place for what `stream` does from here on; of those
    /// that do not, because the job went on without this step's gradients, the values come back as little-endian f32.
    #[pyo3(signature = (tensors, factor = 1.0, on_device = Vec::new(), stream = 0))]
    fn results<'py>(
        &self,
        py: Python<'py>,
        tensors: Vec<Target>,
        factor: f32,
        on_device: Vec<u32>,
        stream: u64,
    ) -> PyResult<Vec<(u32, Bound<'py, PyBytes>)>> {
        let (lent, elsewhere) = self.with(py, |held| {
            let mut wanted = held.targets(tensors)?;
            let mut elsewhere: Vec<(u32, Vec<u8>)> = Vec::new();
            if let (Some(gpu), Some(event)) = (&held.gpu, held.reducer.finished()) {
                gpu.wait(stream, event)?;
            }
            let mut in_place = Vec::new();
            let (mut written, rows) = (Ok(()), &mut held.rows);
            held.reducer.for_each_result(&mut |result| {
                let index = result.tensor.index();
                rows[index] = match result.rows {
                    RowsCame::All => None,
                    RowsCame::Rows(rows) => Some(rows.to_vec()),
                };
                if !result.values.is_empty() && on_device.contains(&result.tensor.0) {
                    let bytes = result.values.iter().flat_map(|value| value.to_le_bytes());
                    elsewhere.push((result.tensor.0, bytes.collect()));
                }
                for mut memory in wanted[index].drain(..) {
                    if memory.holds(result.values) {
                        in_place.push(memory);
                    } else if written.is_ok() {
                        written = memory.write(result.values, factor);
                    }
                }
            });
            held.reducer
                .check_device()
                .map_err(|error| reducing(&error))?;
            let lent = held.give_back();
            in_place.iter_mut().for_each(|memory| memory.scale(factor));
            written.map(|()| (lent, elsewhere))
        })?;
        drop(lent);
        let bytes = |(tensor, bytes): (u32, Vec<u8>)| (tensor, PyBytes::new(py, &bytes));
        Ok(elsewhere.into_iter().map(bytes).collect())
    }

    /// Fresh rows of a tensor in the last results, ascending, as little-endian u32; `None` for all of them.
    fn rows<'py>(&self, py: Python<'py>, tensor: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let rows = self.with(py, |held| {
            let rows = held.rows.get(tensor).cloned();
            rows.ok_or_else(|| super::errors::config(format!("there is no tensor {tensor}")))
        })?;
        Ok(rows.map(|rows| {
            let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
            PyBytes::new(py, &bytes)
        }))
    }

    /// Step, update and feedback state: arrays of little-endian f32 by name.
    fn export_state<'py>(&self, py: Python<'py>) -> PyResult<Exported<'py>> {
        let state = self.with(py, |held| {
            let state = held.reducer.export_state();
            held.reducer
                .check_device()
                .map_err(|error| reducing(&error))?;
            Ok(state)
        })?;
        let arrays = state.arrays.into_iter().map(|(name, values)| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name, PyBytes::new(py, &bytes))
        });
        Ok((state.step.0, state.update, arrays.collect()))
    }

    /// Continues from what `export_state` gave. Before the first step only.
    fn import_state(
        &self,
        py: Python<'_>,
        step: u64,
        update: u64,
        arrays: Vec<(String, Vec<u8>)>,
    ) -> PyResult<()> {
        let arrays = arrays
            .iter()
            .map(|(name, bytes)| (name.clone(), floats(bytes)));
        let state = WorkerState {
            step: Step(step),
            update,
            arrays: arrays.collect(),
        };
        self.with(py, |held| {
            held.reducer
                .import_state(state)
                .map_err(|error| reducing(&error))
        })
    }

    /// One update's gradients were averaged by other means, on all workers alike.
    fn pass_update(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |held| {
            held.reducer.pass_update().map_err(|error| reducing(&error))
        })
    }

    /// Replaces what was not sent of a tensor, little-endian f32, by `values` (none: zeros), and returns what there was.
    fn swap_residual<'py>(
        &self,
        py: Python<'py>,
        tensor: u32,
        values: &[u8],
    ) -> PyResult<Bound<'py, PyBytes>> {
        let values = floats(values);
        let held = self.with(py, |held| {
            let swapped = held.reducer.swap_residual(TensorId(tensor), values);
            let swapped = swapped.map_err(|error| reducing(&error))?;
            held.reducer
                .check_device()
                .map_err(|error| reducing(&error))?;
            Ok(swapped)
        })?;
        let bytes: Vec<u8> = held.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(PyBytes::new(py, &bytes))
    }

    /// SHA-256 of all parameters before `step`, the next one, for shard 0 to compare with those of the others. Best effort.
    fn digest(&self, py: Python<'_>, step: u64, digest: [u8; 32]) -> PyResult<()> {
        self.with(py, |held| {
            held.reducer.digest(Step(step), digest);
            Ok(())
        })
    }

    /// Tells shard 0's page how training goes. A loss that is not known is NaN. Best effort.
    fn report(
        &self,
        py: Python<'_>,
        step: u64,
        loss: f32,
        step_seconds: f32,
        wait_seconds: f32,
    ) -> PyResult<()> {
        self.with(py, |held| {
            held.reducer.report(TrainReport {
                step: Step(step),
                loss,
                step_seconds,
                wait_seconds,
            });
            Ok(())
        })
    }

    /// Leaves the job in order. A session that has ended already stays so.
    fn leave(&self, py: Python<'_>) {
        py.detach(|| {
            if let Some(held) = self.lock().take() {
                Box::new(held.reducer).leave();
            }
        });
    }
}
