//! Gaussian V to the bit.

use crate::device::gaussian;
use crate::memory::Memory;
use arc_topk_common::compress::{ProjectionKey, SketchShape, projection};
use arc_topk_common::config::algorithm::ProjectionKind;
use arc_topk_kernels::Projection;

#[test]
fn gaussian_entries_are_the_references_to_the_bit() {
    let shapes = [(1usize, 1usize), (27, 4), (512, 4), (1376, 3), (9000, 8)];
    let mut out: Vec<Memory> = shapes
        .iter()
        .map(|(width, rank)| Memory::poisoned(width * rank * 4, 0))
        .collect();
    let key = |tensor| ProjectionKey {
        seed: 0xdead_beef_1234_5678,
        tensor,
        step: 1 << 40,
    };
    let targets: Vec<Projection> = (0..)
        .zip(&shapes)
        .zip(&mut out)
        .map(|((tensor, (width, rank)), memory)| Projection {
            out: memory.address(),
            entries: (width * rank) as u32,
            tensor,
        })
        .collect();
    gaussian(&targets, key(0), 3);
    for ((tensor, (width, rank)), memory) in (0..).zip(shapes).zip(&out) {
        let shape = SketchShape {
            width,
            rank,
            kind: ProjectionKind::Gaussian,
        };
        assert_eq!(memory.read::<f32>(), projection(shape, key(tensor)));
    }
}
