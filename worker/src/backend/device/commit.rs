//! The end of rounds on a device.

use super::block::At;
use super::driver::Driver;
use super::gather::quant_block;
use super::layout::wire;
use super::{DeviceBackend, Home};
use crate::backend::{Energies, SegmentCommit, SentRows};
use arc_topk_common::compress::ValueCodec;
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::ids::TensorId;
use arc_topk_common::plan::Segment;
use arc_topk_kernels as kernels;
use arc_topk_kernels::{CommitFlags, EnergySource, names};
use core::ops::Range;

/// How a segment's round ended, for the kernel.
struct End<'a> {
    part: usize,
    flags: CommitFlags,
    rows: &'a [u32],
    sent: &'a [u8],
    up: ValueCodec,
    mean: &'a [u8],
    down: ValueCodec,
    /// ‖A‖² and its parts are wanted, of rows that were chosen; of the residual in any case.
    measure: bool,
}

impl End<'_> {
    fn has(&self, flag: CommitFlags) -> bool {
        self.flags.0 & flag.0 != 0
    }
}

impl<D: Driver> DeviceBackend<D> {
    pub(super) fn commit_round(&mut self, ends: &[SegmentCommit<'_>]) -> Vec<Energies> {
        let Some(first) = ends.first() else {
            return Vec::new();
        };
        let bucket = self.layout.place(first.segment).bucket;
        let ends: Vec<End<'_>> = ends.iter().map(|end| self.end(end)).collect();
        let energies = self.finish(bucket, &ends);
        self.forget_late(bucket, &ends);
        energies
    }

    pub(super) fn restore_segment(
        &mut self,
        segment: Segment,
        codec: ValueCodec,
        mean: &[u8],
        counted: bool,
    ) {
        let place = self.layout.place(segment);
        let flags = CommitFlags::ALL.and(CommitFlags::RESTORE);
        let end = End {
            part: place.part,
            flags: if counted {
                flags.and(CommitFlags::COUNTED)
            } else {
                flags
            },
            rows: &[],
            sent: &[],
            up: codec,
            mean,
            down: codec,
            measure: false,
        };
        self.finish(place.bucket, &[end]);
    }

    fn end<'a>(&self, end: &SegmentCommit<'a>) -> End<'a> {
        let (all, rows) = match end.rows {
            SentRows::All => (CommitFlags::ALL, &[][..]),
            // There is no union without topk, which `new` refuses.
            SentRows::Some(rows) | SentRows::Union { own: rows, .. } => {
                (CommitFlags::default(), rows)
            }
        };
        let flags = match end.sent {
            Some(_) => all.and(CommitFlags::COUNTED),
            None if end.abstained => all.and(CommitFlags::ABSTAINED),
            None => all,
        };
        End {
            part: self.layout.place(end.segment).part,
            flags,
            rows,
            sent: end.sent.unwrap_or_default(),
            up: end.codec_up,
            mean: end.mean,
            down: end.codec_down,
            measure: end.measure,
        }
    }

    /// All segments of a round at once.
    fn finish(&mut self, bucket: usize, ends: &[End<'_>]) -> Vec<Energies> {
        for end in ends {
            self.prepare(bucket, end);
        }
        let parts = ends.iter().map(|end| end.part);
        let first = parts.clone().min().unwrap_or(0);
        let range = first..parts.max().map_or(0, |last| last + 1);

        self.block.clear();
        let arrays: Vec<[At; 3]> = ends
            .iter()
            .map(|end| {
                let rows = self.block.push(end.rows);
                [rows, self.block.push(end.sent), self.block.push(end.mean)]
            })
            .collect();
        let segments = self.describe(bucket, range.clone());
        let segments = self.block.push(&segments);
        let commits = self.block.reserve::<kernels::Commit>(range.len());
        let base = self.device.get_mut().stage(self.block.bytes().len());
        let mut described = vec![kernels::Commit::default(); range.len()];
        for (end, [rows, sent, mean]) in ends.iter().zip(arrays) {
            described[end.part - first] = kernels::Commit {
                rows: rows.address(base),
                sent: sent.address(base),
                mean: mean.address(base),
                count: end.rows.len() as u32,
                flags: end.flags,
                wire_up: wire(end.up),
                quant_up: quant_block(end.up),
                wire_down: wire(end.down),
                quant_down: quant_block(end.down),
            };
        }
        self.block.write(commits, &described);
        self.send_block();

        // Tables count segments from the bucket's first on.
        let segments = segments
            .address(base)
            .wrapping_sub((first * size_of::<kernels::Segment>()) as u64);
        let commits = commits
            .address(base)
            .wrapping_sub((first * size_of::<kernels::Commit>()) as u64);
        let before = self.input_energies(bucket, segments, ends);
        for tiles in self.runs(bucket, ends.iter().map(|end| end.part)) {
            let arguments = kernels::CommitArgs {
                segments,
                commits,
                tiles: self.tiles_at(bucket, &tiles),
                unscale: 1.0,
                rescale: 1.0,
            };
            // SAFETY: the block holds what the arguments point to; state is the layout's, gradients and results are this
            // backend's or lent. Tiles name segments of `ends` alone.
            unsafe {
                let device = self.device.get_mut();
                device.launch(names::COMMIT, tiles.len(), &arguments);
            }
        }
        self.residual_energies(bucket, segments, ends, before)
    }

    /// There is a place for the result, and one for what was not counted.
    fn prepare(&mut self, bucket: usize, end: &End<'_>) {
        let part = &mut self.layout.buckets[bucket].parts[end.part];
        let index = part.segment.tensor.index();
        let tensor = &mut self.layout.tensors[index];
        let moves = !end.has(CommitFlags::ABSTAINED) && !end.has(CommitFlags::RESTORE);
        if tensor.rule.keeps_late && moves {
            part.late = !end.has(CommitFlags::COUNTED);
            if part.late && tensor.blended == 0 {
                tensor.blended = self.device.get_mut().allocate_state(tensor.padded);
            }
        }
        if let Home::Nowhere = self.homes[index] {
            self.own_memory(index);
        }
    }

    /// Gives back what held what was not counted, once it is.
    fn forget_late(&mut self, bucket: usize, ends: &[End<'_>]) {
        for end in ends {
            let tensor = self.layout.buckets[bucket].parts[end.part].segment.tensor;
            let mut parts = self.layout.buckets[bucket].parts.iter();
            if parts.any(|part| part.segment.tensor == tensor && part.late) {
                continue;
            }
            self.layout.tensors[tensor.index()].release_late(self.device.get_mut());
        }
    }

    pub(super) fn import_late(&mut self, id: TensorId, values: &[f32]) {
        let tensor = &mut self.layout.tensors[id.index()];
        let device = self.device.get_mut();
        if values.is_empty() {
            tensor.release_late(device);
        } else {
            if tensor.blended == 0 {
                tensor.blended = device.allocate_state(tensor.padded);
            }
            device.upload(tensor.blended, values);
        }
        let parts = self.layout.buckets.iter_mut();
        let parts = parts.flat_map(|bucket| &mut bucket.parts);
        for part in parts.filter(|part| part.segment.tensor == id) {
            part.late = !values.is_empty();
        }
    }

    /// ‖A‖² of the segments whose rows were chosen, if they are measured.
    fn input_energies(&mut self, bucket: usize, segments: u64, ends: &[End<'_>]) -> Vec<Energies> {
        let measured = |end: &End<'_>| end.measure && !end.has(CommitFlags::ALL);
        let parts: Vec<usize> = ends
            .iter()
            .filter(|end| measured(end))
            .map(|end| end.part)
            .collect();
        let rows = self.energies(bucket, segments, &parts, EnergySource::Input);
        let of = |end: &End<'_>| {
            let Some(at) = parts.iter().position(|part| *part == end.part) else {
                return Energies::default();
            };
            let first = self.layout.buckets[bucket].parts[end.part]
                .segment
                .row_start;
            let input = rows[at].iter().sum();
            let sent = end.rows.iter().map(|row| rows[at][(row - first) as usize]);
            let sent: f64 = sent.sum();
            Energies {
                input,
                sent,
                residual: input - sent,
            }
        };
        ends.iter().map(of).collect()
    }

    /// ‖e‖² where there is a residual that rounding is part of.
    fn residual_energies(
        &mut self,
        bucket: usize,
        segments: u64,
        ends: &[End<'_>],
        mut energies: Vec<Energies>,
    ) -> Vec<Energies> {
        let keeps = |end: &End<'_>| {
            let part = &self.layout.buckets[bucket].parts[end.part];
            self.layout.tensors[part.segment.tensor.index()]
                .rule
                .feedback
                == Feedback::Ef14
        };
        let wanted: Vec<bool> = ends.iter().map(|end| end.measure && keeps(end)).collect();
        let measured = ends.iter().zip(&wanted).filter(|(_, wanted)| **wanted);
        let parts: Vec<usize> = measured.map(|(end, _)| end.part).collect();
        let rows = self.energies(bucket, segments, &parts, EnergySource::Blended);
        let of_wanted = energies.iter_mut().zip(&wanted);
        let of_wanted = of_wanted.filter(|(_, wanted)| **wanted);
        for ((energies, _), rows) in of_wanted.zip(rows) {
            energies.residual = rows.iter().sum();
        }
        energies
    }

    /// Energies of the rows of some parts.
    fn energies(
        &mut self,
        bucket: usize,
        segments: u64,
        parts: &[usize],
        source: EnergySource,
    ) -> Vec<Vec<f64>> {
        for tiles in self.runs(bucket, parts.iter().copied()) {
            let arguments = kernels::EnergyArgs {
                segments,
                tiles: self.tiles_at(bucket, &tiles),
                source,
                dense_round: 0,
                unscale: 1.0,
                reserved: 0,
            };
            // SAFETY: as for the commit; every part has scratch for its energies.
            unsafe {
                let device = self.device.get_mut();
                device.launch(names::ENERGY, tiles.len(), &arguments);
            }
        }
        let device = self.device.get_mut();
        let fetch = |part: &usize| {
            let part = &self.layout.buckets[bucket].parts[*part];
            let mut values = vec![0.0f64; part.energies()];
            device.fetch(part.energy, bytemuck::cast_slice_mut(&mut values));
            let mut rows = vec![0.0; part.shape.rows as usize];
            for sums in values.chunks_exact(rows.len().max(1)) {
                rows.iter_mut().zip(sums).for_each(|(row, sum)| *row += sum);
            }
            rows
        };
        parts.iter().map(fetch).collect()
    }

    /// Tiles of some parts, in as few pieces as they make.
    fn runs(&self, bucket: usize, parts: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
        let mut parts: Vec<usize> = parts.collect();
        parts.sort_unstable();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for part in parts {
            let tiles = self.layout.buckets[bucket].parts[part].tiles.clone();
            match runs.last_mut() {
                Some(last) if last.end == tiles.start => last.end = tiles.end,
                _ => runs.push(tiles),
            }
        }
        runs
    }

    fn tiles_at(&self, bucket: usize, tiles: &Range<usize>) -> u64 {
        self.layout.buckets[bucket].tiles + (tiles.start * size_of::<kernels::Tile>()) as u64
    }
}
