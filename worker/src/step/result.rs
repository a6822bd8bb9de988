//! What takes the gradients' place.

use arc_topk_common::ids::TensorId;

pub use arc_topk_common::optim::RowsCame;

/// The result of one tensor: what the optimizer gets instead of the gradient.
#[derive(Clone, Copy, Debug)]
pub struct TensorResult<'a> {
    /// Tensor.
    pub tensor: TensorId,
    /// Its elements, row-major, without padding. Rows that did not come are zero (ef14, none) or old (ef21).
    pub values: &'a [f32],
    /// Rows that are fresh. Rows are those of the plan's view: `block_width` changes them.
    pub rows: RowsCame<'a>,
    /// Elements of a row; the last row may be shorter.
    pub width: usize,
}
