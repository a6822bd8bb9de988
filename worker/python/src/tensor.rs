//! The only place where an address that Python gives becomes a slice.
#![allow(unsafe_code, reason = "tensors are used in place, by their address")]

use arc_topk_worker::backend::{DeviceGradient, Lent, device};
use half::{bf16, f16};
use pyo3::{PyErr, PyResult};
use std::ptr::NonNull;
use std::sync::Arc;

/// A tensor's element type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Element {
    F32,
    Bf16,
    F16,
}

impl Element {
    pub(crate) fn parse(name: &str) -> PyResult<Self> {
        match name {
            "float32" => Ok(Self::F32),
            "bfloat16" => Ok(Self::Bf16),
            "float16" => Ok(Self::F16),
            other => Err(super::errors::config(format!(
                "elements of type {other} cannot be averaged: use float32, bfloat16 or float16"
            ))),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A tensor in the caller's memory: contiguous elements from an address on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    address: usize,
    elements: usize,
    element: Element,
}

impl Memory {
    /// `address` must be that of `elements` elements of the type that `dtype` names, which nobody else uses during the call.
    ///
    /// # Errors
    /// A type that is not known, or an address that cannot be one.
    pub(crate) fn new(address: usize, elements: usize, dtype: &str) -> PyResult<Self> {
        let element = Element::parse(dtype)?;
        let aligned = address.is_multiple_of(element.bytes());
        let fits = elements <= isize::MAX as usize / 4;
        if elements > 0 && address == 0 || !aligned || !fits {
            let text = format!("{elements} elements of {dtype} cannot be at address {address:#x}");
            return Err(super::errors::config(text));
        }
        Ok(Self {
            address,
            elements,
            element,
        })
    }

    fn slice_mut<T>(&mut self) -> &mut [T] {
        if self.elements == 0 {
            return &mut [];
        }
        // SAFETY: by the contract of `new`, which every caller of the Python half keeps by holding the tensor: the memory is
        // there, of this type, and used by nobody else during the call. Alignment and length were checked.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, self.elements) }
    }

    /// Lends float32 elements to a reducer, which works in their place; `None` for other types.
    ///
    /// The caller must hold the tensor, and leave it alone, until the reducer has given it back.
    pub(crate) fn lend(&self) -> Option<Lent> {
        let address = NonNull::new(self.address as *mut f32)?;
        // SAFETY: the memory is there by the contract of `new`, and stays there: the session holds the tensor until it has
        // called `give_back`, or has dropped the reducer. Alignment and length were checked.
        (self.element == Element::F32).then(|| unsafe { Lent::new(address, self.elements) })
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.elements * self.element.bytes()
    }

    /// Lends elements that lie on a GPU, there once `ready` has happened.
    ///
    /// # Safety
    /// That of [`DeviceGradient::new`].
    pub(crate) unsafe fn on_device(&self, ready: Option<Arc<dyn device::Ready>>) -> DeviceGradient {
        let element = match self.element {
            Element::F32 => device::Element::F32,
            Element::Bf16 => device::Element::Bf16,
            Element::F16 => device::Element::F16,
        };
        // SAFETY: the caller's promise; alignment was checked.
        unsafe { DeviceGradient::new(self.address as u64, self.elements, element, ready) }
    }

    /// Whether it is where these values lie.
    pub(crate) fn holds(&self, values: &[f32]) -> bool {
        let same = std::ptr::eq(self.address as *const f32, values.as_ptr());
        same && self.element == Element::F32 && self.elements == values.len()
    }

    /// Multiplies the elements by `factor`.
    pub(crate) fn scale(&mut self, factor: f32) {
        let scaled = |value: &mut f32| *value *= factor;
        if factor != 1.0 && self.element == Element::F32 {
            self.slice_mut::<f32>().iter_mut().for_each(scaled);
        }
    }

    /// Writes `values` times `factor`.
    ///
    /// # Errors
    /// If their number is not that of the elements.
    pub(crate) fn write(&mut self, values: &[f32], factor: f32) -> Result<(), PyErr> {
        if values.len() != self.elements {
            return Err(super::errors::config(format!(
                "a result of {} values was to be written to {} elements",
                values.len(),
                self.elements
            )));
        }
        let values = values.iter().map(|value| value * factor);
        match self.element {
            Element::F32 => fill(self.slice_mut(), values),
            Element::Bf16 => fill(self.slice_mut(), values.map(bf16::from_f32)),
            Element::F16 => fill(self.slice_mut(), values.map(f16::from_f32)),
        }
        Ok(())
    }
}

fn fill<T>(to: &mut [T], values: impl Iterator<Item = T>) {
    to.iter_mut()
        .zip(values)
        .for_each(|(to, value)| *to = value);
}

/// Some elements from an address on, as Python gives them: `(address, elements)`. It is no `Clone`, so that it is used once.
#[derive(Debug, pyo3::FromPyObject)]
pub(crate) struct Place(usize, usize);

/// Types of which every pattern of bits is a value.
pub(crate) trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for bf16 {}
impl Plain for f16 {}
impl Plain for i64 {}

/// All places that one call uses. Addresses come from Python, so that it is looked at whether what is written is there once.
#[derive(Default)]
pub(crate) struct Places {
    /// Start, end, and whether it is written.
    spans: Vec<(usize, usize, bool)>,
}

/// The places of a call were looked at: none that is written meets another.
pub(crate) struct Apart(());

impl Places {
    /// A place that will be used for elements of type `T`.
    ///
    /// # Errors
    /// If it cannot be one.
    pub(crate) fn add<T: Plain>(&mut self, place: &Place, written: bool) -> PyResult<()> {
        let Place(address, elements) = *place;
        let bytes = elements.checked_mul(size_of::<T>());
        let end = bytes
            .filter(|bytes| *bytes <= isize::MAX as usize)
            .and_then(|bytes| address.checked_add(bytes));
        let known = elements == 0 || address != 0 && address.is_multiple_of(align_of::<T>());
        match end {
            Some(end) if known => self.spans.push((address, end, written)),
            _ => {
                let text = format!("{elements} elements cannot be at address {address:#x}");
                return Err(super::errors::config(text));
            }
        }
        Ok(())
    }

    /// # Errors
    /// If a place that is written meets another.
    pub(crate) fn apart(mut self) -> PyResult<Apart> {
        self.spans.retain(|(start, end, _)| start < end);
        self.spans.sort_unstable();
        // Ends of what is read, and of what is written, so far.
        let (mut read, mut wrote) = (0, 0);
        for (start, end, written) in self.spans {
            if start < wrote || written && start < read {
                return Err(super::errors::config(
                    "tensors of the optimizer share memory: give each parameter, gradient and moment its own",
                ));
            }
            let furthest = if written { &mut wrote } else { &mut read };
            *furthest = end.max(*furthest);
        }
        Ok(Apart(()))
    }
}

impl Place {
    /// Its elements. Only for a place that was [added](Places::add) as one of `T`, and of a tensor that is held during the call.
    pub(crate) fn read<T: Plain>(self, _: &Apart) -> &[T] {
        if self.1 == 0 {
            return &[];
        }
        // SAFETY: the caller's tensor is there during the call, which its Python half sees to; alignment and length were
        // checked by `add`, that nothing writes to it by `apart`, and every pattern of bits is a `T`.
        unsafe { std::slice::from_raw_parts(self.0 as *const T, self.1) }
    }

    /// Its elements, to be written; as above, for one that was added as written.
    #[allow(
        clippy::mut_from_ref,
        reason = "the memory is not that of `Apart`, which only says that this place meets no other"
    )]
    pub(crate) fn write<T: Plain>(self, _: &Apart) -> &mut [T] {
        if self.1 == 0 {
            return &mut [];
        }
        // SAFETY: as above; `apart` saw that no other place of the call meets it.
        unsafe { std::slice::from_raw_parts_mut(self.0 as *mut T, self.1) }
    }
}
