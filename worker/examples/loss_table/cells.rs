//! The cells of the table: what is compared with what.

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, SelectionPolicy, ValueType};
use arc_topk_common::config::train::OptimizerChoice;

/// One row of the table.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Cell {
    pub(crate) algorithm: AlgorithmConfig,
    pub(crate) optimizer: OptimizerChoice,
    /// Largest τ of catch-up AdamW.
    pub(crate) cap: u32,
}

impl Cell {
    fn dense(optimizer: OptimizerChoice) -> Self {
        let algorithm = AlgorithmConfig {
            compressor: Compressor::Dense,
            density: 1.0,
            ..base()
        };
        Self {
            algorithm: values(algorithm, ValueType::F32),
            optimizer,
            cap: 20,
        }
    }

    fn sparse(density: f32, value_type: ValueType, optimizer: OptimizerChoice) -> Self {
        let algorithm = AlgorithmConfig { density, ..base() };
        Self {
            algorithm: values(algorithm, value_type),
            optimizer,
            cap: 20,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut AlgorithmConfig)) -> Self {
        change(&mut self.algorithm);
        self
    }

    /// A name that tells cells apart, and stays the same between versions of this program: finished runs are found by it.
    pub(crate) fn name(&self) -> String {
        let (a, base) = (&self.algorithm, base());
        let optimizer = match self.optimizer {
            OptimizerChoice::Sgd => "sgd".to_owned(),
            OptimizerChoice::AdamW => "adamw".to_owned(),
            OptimizerChoice::CatchUpAdamW => format!("catchup{}", self.cap),
        };
        if a.compressor == Compressor::Dense {
            return format!("dense {optimizer}");
        }
        let up = lower(a.wire_up);
        let wire = if a.wire_up == a.wire_down {
            up
        } else {
            format!("{up}/{}", lower(a.wire_down))
        };
        let mut name = format!(
            "{} {} d{} {wire} {optimizer}",
            lower(a.compressor),
            lower(a.feedback),
            a.density
        );
        let mut note = |differs: bool, text: String| {
            if differs {
                name.push(' ');
                name.push_str(&text);
            }
        };
        note(a.selection == SelectionPolicy::Pooled, "pooled".to_owned());
        note(
            a.block_width != base.block_width,
            format!("block{}", a.block_width),
        );
        note(a.energy != base.energy, format!("energy{}", a.energy));
        note(
            a.sketch_rank != base.sketch_rank,
            format!("rank{}", a.sketch_rank),
        );
        note(
            a.feedback_decay != base.feedback_decay,
            format!("decay{}", a.feedback_decay),
        );
        note(
            a.warmup_updates != base.warmup_updates,
            format!("warmup{}", a.warmup_updates),
        );
        note(
            a.wire_sketch != base.wire_sketch,
            format!("sketch-{}", lower(a.wire_sketch)),
        );
        note(
            a.wire_warmup != base.wire_warmup,
            format!("warm-{}", lower(a.wire_warmup)),
        );
        name
    }
}

/// What a cell has where its name does not say otherwise: never the defaults, which may follow the table.
fn base() -> AlgorithmConfig {
    AlgorithmConfig {
        feedback: Feedback::Ef14,
        feedback_decay: 1.0,
        energy: 1.0,
        sketch_rank: 4,
        selection: SelectionPolicy::PerTensor,
        block_width: 0,
        wire_sketch: ValueType::Bf16,
        wire_dense: ValueType::F32,
        wire_warmup: ValueType::F32,
        quant_block: 64,
        warmup_updates: 20,
        ramp_updates: 0,
        ..AlgorithmConfig::default()
    }
}

fn values(mut algorithm: AlgorithmConfig, value_type: ValueType) -> AlgorithmConfig {
    (algorithm.wire_up, algorithm.wire_down) = (value_type, value_type);
    algorithm
}

fn lower(value: impl core::fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

/// The default cells, the most telling first: each setting varied by itself, then the combinations that promise most.
pub(crate) fn default_cells() -> Vec<Cell> {
    use OptimizerChoice::{AdamW, CatchUpAdamW, Sgd};
    use ValueType::{Bf16, F32, Int4, Int8};
    let int4 = |density| Cell::sparse(density, Int4, CatchUpAdamW);
    let mut cells = vec![Cell::dense(AdamW)];
    for density in [0.2, 0.4, 0.05, 0.02] {
        cells.push(int4(density));
        cells.push(Cell::sparse(density, Int4, AdamW));
        cells.push(Cell::sparse(density, Bf16, CatchUpAdamW));
    }
    let pooled = |a: &mut AlgorithmConfig| a.selection = SelectionPolicy::Pooled;
    cells.extend([0.2, 0.05].map(|density| int4(density).with(pooled)));
    cells.extend([0.2, 0.05].map(|density| Cell {
        cap: 8,
        ..int4(density)
    }));
    // Sketches that cost less, so that a density of 0.2 stays under a thirtieth of the bytes.
    let frugal = |a: &mut AlgorithmConfig| a.wire_sketch = Int8;
    cells.push(int4(0.2).with(frugal));
    cells.push(int4(0.2).with(frugal).with(pooled));
    cells.extend([1, 8].map(|rank| int4(0.2).with(|a| a.sketch_rank = rank)));
    cells.extend([64, 512].map(|width| int4(0.2).with(|a| a.block_width = width)));
    cells.push(
        int4(0.2)
            .with(frugal)
            .with(|a| (a.block_width, a.sketch_rank) = (64, 1)),
    );
    cells.extend([0, 10].map(|updates| int4(0.2).with(|a| a.warmup_updates = updates)));
    cells.push(int4(0.05).with(|a| a.feedback_decay = 0.95));
    // A warm-up that costs less.
    for (density, wire) in [(0.2, Int8), (0.2, Int4), (0.4, Int8)] {
        cells.push(int4(density).with(frugal).with(|a| a.wire_warmup = wire));
    }
    cells.push(Cell {
        cap: 8,
        ..int4(0.2).with(frugal).with(|a| a.wire_warmup = Int8)
    });
    cells.push(int4(0.2).with(|a| a.feedback = Feedback::None));
    // Their estimates need the mean as it is.
    let rules = [Feedback::Ef21, Feedback::Ef21m];
    cells.extend(rules.map(|rule| int4(0.2).with(|a| (a.feedback, a.wire_down) = (rule, F32))));
    let others = [Compressor::Randk, Compressor::Topk];
    cells.extend(others.map(|other| int4(0.2).with(|a| a.compressor = other)));
    cells.push(Cell::sparse(0.2, Int8, CatchUpAdamW));
    cells.push(int4(0.2).with(|a| a.wire_down = Int8));
    cells.extend([Cell::dense(Sgd), Cell::sparse(0.2, F32, Sgd)]);
    cells
}

/// Cells that are compared when they are named (`--cells`, `--only`): the defaults' wires at densities that the energy may
/// leave unused.
pub(crate) fn energy_cells() -> Vec<Cell> {
    let pairs = [
        (0.2, &[0.9][..]),
        (0.4, &[0.9, 0.8, 0.6, 0.45][..]),
        (1.0, &[0.6][..]),
    ];
    let each = pairs.into_iter().flat_map(|(density, energies)| {
        energies.iter().map(move |energy| {
            Cell::sparse(density, ValueType::Int4, OptimizerChoice::CatchUpAdamW).with(|a| {
                (a.wire_sketch, a.wire_warmup) = (ValueType::Int8, ValueType::Int8);
                a.energy = *energy;
            })
        })
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_valid_and_told_apart_by_name() {
        let mut cells = default_cells();
        cells.extend(energy_cells());
        let mut names: Vec<String> = cells.iter().map(Cell::name).collect();
        for cell in &cells {
            cell.algorithm
                .validate()
                .expect("a cell of the table is valid");
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cells.len());
    }
}
