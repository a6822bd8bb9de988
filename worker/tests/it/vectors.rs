//! Golden vectors through the whole machines, with both kernels of the CPU and the device backend.

use crate::support::{emulated, golden};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::compress::reference::Reference;
use arc_topk_worker::backend::on_cpu;
use std::sync::Arc;

#[test]
fn reference() {
    golden::check_all(&on_cpu(Arc::new(Reference)));
}

#[test]
fn fast() {
    golden::check_all(&on_cpu(Arc::new(Fast)));
}

#[test]
fn device() {
    golden::check_all(&emulated::backend(3));
}
