//! The function `catch_up_adamw`: one step of the optimizer on PyTorch's own memory.

use super::errors::config;
use super::tensor::{Apart, Element, Place, Places};
use arc_topk_common::optim::{AdamStep, AdamTensor, Elements, catch_up_adamw as step_of_all};
use half::{bf16, f16};
use pyo3::prelude::*;

/// A tensor that takes a step.
#[derive(FromPyObject)]
pub(crate) struct Stepped(
    /// Type of parameter and gradient.
    String,
    /// Elements of a row.
    usize,
    /// Number of this step.
    i64,
    /// Parameter.
    Place,
    /// Gradient.
    Place,
    /// First moments, f32.
    Place,
    /// Second moments, f32.
    Place,
    /// Steps in which rows came last, i64.
    Place,
    /// Sums of τ, i64.
    Place,
    /// Rows that came, i64, ascending; `None` for all.
    Option<Place>,
);

/// One step of catch-up AdamW for all tensors, in place: `(dtype, width, step, parameter, gradient, exp_avg, exp_avg_sq, last,
/// seen, rows)` of each, memory as `(address, elements)`. `rates` are those of the last steps, this one's first.
#[pyfunction]
#[pyo3(signature = (tensors, *, betas, eps, weight_decay, rates, cap, maximize, parallel))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn catch_up_adamw(
    py: Python<'_>,
    tensors: Vec<Stepped>,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    rates: Vec<f64>,
    cap: u32,
    maximize: bool,
    parallel: bool,
) -> PyResult<()> {
    if rates.is_empty() {
        return Err(config("a step needs a learning rate"));
    }
    py.detach(|| {
        let mut places = Places::default();
        for tensor in &tensors {
            tensor.add_to(&mut places)?;
        }
        let apart = places.apart()?;
        let tensors = tensors.into_iter().map(|tensor| tensor.lent(&apart));
        let step = AdamStep {
            betas,
            eps,
            weight_decay,
            rates: &rates,
            cap,
            maximize,
        };
        step_of_all(&step, tensors.collect::<PyResult<_>>()?, parallel).map_err(config)
    })
}

impl Stepped {
    fn add_to(&self, places: &mut Places) -> PyResult<()> {
        let Self(dtype, _, _, parameter, gradient, first, second, last, seen, rows) = self;
        let add = match Element::parse(dtype)? {
            Element::F32 => Places::add::<f32>,
            Element::Bf16 => Places::add::<bf16>,
            Element::F16 => Places::add::<f16>,
        };
        add(places, parameter, true)?;
        add(places, gradient, false)?;
        for moment in [first, second] {
            places.add::<f32>(moment, true)?;
        }
        for count in [last, seen] {
            places.add::<i64>(count, true)?;
        }
        let rows = rows.as_ref();
        rows.map_or(Ok(()), |rows| places.add::<i64>(rows, false))
    }

    fn lent(self, apart: &Apart) -> PyResult<AdamTensor<'_>> {
        let Self(dtype, width, step, x, g, first, second, last, seen, rows) = self;
        Ok(AdamTensor {
            elements: match Element::parse(&dtype)? {
                Element::F32 => Elements::F32(x.write(apart), g.read(apart)),
                Element::Bf16 => Elements::Bf16(x.write(apart), g.read(apart)),
                Element::F16 => Elements::F16(x.write(apart), g.read(apart)),
            },
            width,
            first: first.write(apart),
            second: second.write(apart),
            last: last.write(apart),
            seen: seen.write(apart),
            rows: rows.map(|rows| rows.read(apart)),
            step,
        })
    }
}
