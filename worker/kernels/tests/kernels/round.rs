//! One round of some tensors: every kernel but the optimizer, beside the scalar reference.

use crate::device::{Device, End, Spec, Wanted, rounded, stored};
use arc_topk_common::compress::philox;
use arc_topk_common::compress::reference::Reference;
use arc_topk_common::compress::{
    FeedbackParams, Kernels, ProjectionKey, SketchShape, TensorState, ValueCodec,
};
use arc_topk_common::config::algorithm::{Feedback, ProjectionKind, ValueType};
use arc_topk_kernels::{CommitFlags, Element, EnergySource, PieceSource};

/// How a segment's round ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Counted,
    NotCounted,
    Abstained,
}

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) shapes: Vec<Shape>,
    pub(crate) feedback: Feedback,
    pub(crate) rank: usize,
    pub(crate) kind: ProjectionKind,
    pub(crate) up: ValueCodec,
    pub(crate) down: ValueCodec,
    pub(crate) dense_round: bool,
    pub(crate) outcome: Outcome,
    pub(crate) unscale: f32,
    pub(crate) noise: u32,
    /// A value that is not finite lies in this fraction of the first tensor.
    pub(crate) spoilt: Option<f32>,
}

#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    /// Elements that the last row lacks.
    pub(crate) missing: usize,
    pub(crate) cut: f32,
    pub(crate) element: Element,
    pub(crate) flat: bool,
    pub(crate) shift: usize,
    pub(crate) absent: bool,
}

pub(crate) fn noise(seed: u32, len: usize) -> Vec<f32> {
    let key = ProjectionKey {
        seed: 1,
        tensor: seed,
        step: 0,
    };
    let words = (0..len.div_ceil(4) as u32).flat_map(|b| philox::block(key, b));
    // Magnitudes from 2⁻⁸ to 1, so that blocks have scales of their own.
    words
        .take(len)
        .map(|w| (w as i32) as f32 / 2_147_483_648.0 / (1 << (w % 9)) as f32)
        .collect()
}

pub(crate) const PARAMS: FeedbackParams = FeedbackParams {
    eta: 0.3,
    decay: 0.9,
};

pub(crate) fn state_of(shape: &Shape, feedback: Feedback, seed: u32) -> TensorState {
    let mut state = if shape.flat {
        TensorState::for_dense_tensor(feedback, shape.rows * shape.width - shape.missing, true)
    } else {
        TensorState::new(feedback, shape.rows, shape.width)
    };
    let arrays = [
        &mut state.residual,
        &mut state.momentum,
        &mut state.local,
        &mut state.global,
    ];
    for (i, array) in (0..).zip(arrays) {
        let values = noise(seed * 16 + i, array.len());
        array.copy_from_slice(&values);
    }
    if !shape.flat {
        // What pads the last row is zero, as it starts and stays.
        for array in [
            &mut state.residual,
            &mut state.momentum,
            &mut state.local,
            &mut state.global,
        ] {
            let len = array.len();
            array[len.saturating_sub(shape.missing)..].fill(0.0);
        }
    }
    state
}

/// One tensor on the CPU: state, and the gradient as its type holds it.
struct Expected {
    state: TensorState,
    gradient: Vec<f32>,
    buffer: Vec<f32>,
}

fn prepare(case: &Case) -> (Vec<Spec>, Vec<Expected>) {
    let both = (1u32..).zip(&case.shapes).map(|(seed, shape)| {
        let seed = seed + case.noise * 100;
        let state = state_of(shape, case.feedback, seed);
        let elements = shape.rows * shape.width - shape.missing;
        let mut gradient = noise(seed * 16 + 9, elements);
        if let (Some(at), true) = (case.spoilt, seed % 100 == 1) {
            let index = (at * elements as f32) as usize;
            gradient[index.min(elements - 1)] = f32::INFINITY;
        }
        let gradient: Vec<f32> = gradient
            .iter()
            .map(|x| rounded(*x, shape.element))
            .collect();
        let cut = (shape.cut * state.rows as f32) as usize;
        let cuts = if cut > 0 && cut < state.rows {
            vec![cut]
        } else {
            Vec::new()
        };
        let spec = Spec {
            state: state.clone(),
            elements,
            element: shape.element,
            cuts,
            flat: shape.flat,
            shift: shape.shift,
        };
        let expected = Expected {
            state,
            gradient,
            buffer: Vec::new(),
        };
        (spec, expected)
    });
    both.unzip()
}

/// Every third row, and the last.
fn chosen(rows: &core::ops::Range<usize>) -> Vec<u32> {
    let last = rows.end - 1;
    rows.clone()
        .filter(|row| row % 3 == 1 || *row == last)
        .map(|row| row as u32)
        .collect()
}

/// Everything that a round leaves.
#[derive(PartialEq, Debug)]
struct Outputs {
    sketches: Vec<Vec<u8>>,
    values: Vec<Vec<u8>>,
    states: Vec<TensorState>,
    results: Vec<Vec<u8>>,
    energy: f64,
}

fn run(case: &Case, seed: u64) -> Outputs {
    let (specs, mut expected) = prepare(case);
    let mut device = Device::new(&specs, case.rank, PARAMS, seed);
    (device.unscale, device.rescale) = (case.unscale, 1.0 / case.unscale);
    let key = ProjectionKey {
        seed: 0x1234_5678_9abc_def0,
        tensor: 0,
        step: 77,
    };
    for (tensor, shape) in case.shapes.iter().enumerate() {
        let e = &mut expected[tensor];
        device.set_gradient(tensor, &e.gradient);
        e.buffer = e.gradient.iter().map(|g| g * case.unscale).collect();
        if shape.absent {
            device.forget_gradient(tensor);
            e.buffer.fill(0.0);
        }
        e.buffer.resize(e.state.rows * e.state.width, 0.0);
    }
    let norm: f64 = expected
        .iter()
        .flat_map(|e| &e.buffer)
        .map(|x| f64::from(*x).powi(2))
        .sum();
    let places = device.places.clone();
    let finite: Vec<bool> = places
        .iter()
        .map(|place| {
            let e = &mut expected[place.tensor];
            Reference.input(
                &mut e.state,
                PARAMS,
                case.dense_round,
                &mut e.buffer,
                place.rows.clone(),
            )
        })
        .collect();
    let (found, energy) = device.sketch(key, case.kind, case.dense_round, true);
    assert_eq!(found, finite, "segments that are finite");
    if finite.contains(&false) {
        return skipped(case, &device, &specs, &expected);
    }
    assert!((energy - norm).abs() <= 1e-12 * norm, "{energy} {norm}");

    let mut outputs = Outputs {
        sketches: Vec::new(),
        values: Vec::new(),
        states: Vec::new(),
        results: Vec::new(),
        energy,
    };
    if !case.dense_round {
        outputs.sketches = check_sketches(case, &mut device, &expected, key);
        check_energies(&mut device, &expected);
    }
    check_round(case, &mut device, &mut expected, &mut outputs);
    for (tensor, (spec, e)) in specs.iter().zip(&expected).enumerate() {
        let state = device.state(tensor, &spec.state);
        same_bits(&state, &e.state);
        let result: Vec<f32> = e.buffer[..spec.elements]
            .iter()
            .map(|x| x * device.rescale)
            .collect();
        let got = device.gradient(tensor);
        assert!(
            got == stored(&result, spec.element),
            "result of tensor {tensor}"
        );
        outputs.states.push(state);
        outputs.results.push(got);
    }
    outputs
}

/// A step that is skipped leaves state and gradient as they were.
fn skipped(case: &Case, device: &Device, specs: &[Spec], expected: &[Expected]) -> Outputs {
    for (tensor, (spec, e)) in specs.iter().zip(expected).enumerate() {
        same_bits(&device.state(tensor, &spec.state), &spec.state);
        assert!(device.gradient(tensor) == stored(&e.gradient, case.shapes[tensor].element));
    }
    Outputs {
        sketches: Vec::new(),
        values: Vec::new(),
        states: Vec::new(),
        results: Vec::new(),
        energy: 0.0,
    }
}

pub(crate) fn same_bits(a: &TensorState, b: &TensorState) {
    for (name, a, b) in [
        ("residual", &a.residual, &b.residual),
        ("momentum", &a.momentum, &b.momentum),
        ("local", &a.local, &b.local),
        ("global", &a.global, &b.global),
    ] {
        assert_eq!(a.len(), b.len(), "{name}");
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{name}[{i}]: {a} instead of {b}");
        }
    }
}

const F32: ValueCodec = ValueCodec {
    value_type: ValueType::F32,
    quant_block: 64,
};

/// Sums to f32's accuracy; their encoding to the bit.
fn check_sketches(
    case: &Case,
    device: &mut Device,
    expected: &[Expected],
    key: ProjectionKey,
) -> Vec<Vec<u8>> {
    let places = device.places.clone();
    let sparse = |i: &usize| !case.shapes[places[*i].tensor].flat;
    let segments: Vec<usize> = (0..places.len()).filter(sparse).collect();
    let mut all = Vec::new();
    for codec in [F32, case.up] {
        let wanted: Vec<Wanted<'_>> = segments
            .iter()
            .map(|i| Wanted {
                segment: *i,
                source: PieceSource::Sketch,
                rows: None,
                values: places[*i].rows.len() * case.rank,
                codec,
                dense_round: false,
            })
            .collect();
        all.push(device.encode(&wanted, 3).0);
    }
    for (n, i) in segments.iter().enumerate() {
        let (place, e) = (&places[*i], &expected[places[*i].tensor]);
        let shape = SketchShape {
            width: e.state.width,
            rank: case.rank,
            kind: case.kind,
        };
        let key = ProjectionKey {
            tensor: place.tensor as u32,
            ..key
        };
        let mut sketch = vec![0.0; place.rows.len() * case.rank];
        Reference.sketch(
            &e.state,
            shape,
            key,
            &e.buffer,
            place.rows.clone(),
            &mut sketch,
        );
        let mut got = vec![0.0; sketch.len()];
        F32.decode(&all[0][n], &mut got);
        let norms: Vec<f64> = row_norms(e, &place.rows);
        for (at, (got, want)) in got.iter().zip(&sketch).enumerate() {
            // f32 sums of so many terms, in some order.
            let tolerance = 1e-6 * norms[at / case.rank] * (e.state.width as f64).sqrt().max(4.0);
            let error = f64::from(got - want).abs();
            assert!(error <= tolerance, "sketch[{at}]: {got} instead of {want}");
        }
        let mut bytes = Vec::new();
        case.up.encode(&got, &mut bytes);
        assert!(all[1][n] == bytes, "encoded sketch");
    }
    all.concat()
}

fn row_norms(e: &Expected, rows: &core::ops::Range<usize>) -> Vec<f64> {
    let mut energies = vec![0.0; rows.len()];
    Reference.energy(&e.state, &e.buffer, rows.clone(), &mut energies);
    energies.iter().map(|x| x.sqrt()).collect()
}

fn check_energies(device: &mut Device, expected: &[Expected]) {
    let places = device.places.clone();
    let (input, blended) = (
        device.energies(EnergySource::Input, false),
        expected
            .iter()
            .all(|e| e.state.residual.len() == e.buffer.len()),
    );
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
    for (place, rows) in places.iter().zip(&input) {
        let e = &expected[place.tensor];
        let norms = row_norms(e, &place.rows);
        if rows.len() == norms.len() {
            let mut pairs = rows.iter().zip(&norms);
            assert!(
                pairs.all(|(got, norm)| near(*got, norm * norm)),
                "{rows:?} {norms:?}"
            );
        }
        let (got, want): (f64, f64) = (rows.iter().sum(), norms.iter().map(|n| n * n).sum());
        assert!(near(got, want), "{got} {want}");
    }
    if !blended {
        return;
    }
    let residual = device.energies(EnergySource::Blended, false);
    for (place, rows) in places.iter().zip(&residual) {
        let Expected { state, buffer, .. } = &expected[place.tensor];
        let of = place.rows.start * state.width..place.rows.end * state.width;
        // While the round is open, e lies in the buffer.
        let want: f64 = buffer[of].iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!(near(rows.iter().sum(), want));
    }
}

/// Values to the bit, then the end.
fn check_round(case: &Case, device: &mut Device, expected: &mut [Expected], outputs: &mut Outputs) {
    let places = device.places.clone();
    let whole = |i: usize| case.dense_round || case.shapes[places[i].tensor].flat;
    let rows: Vec<Vec<u32>> = places
        .iter()
        .enumerate()
        .map(|(i, place)| {
            if whole(i) {
                Vec::new()
            } else {
                chosen(&place.rows)
            }
        })
        .collect();
    let values = |i: usize| {
        let width = expected[places[i].tensor].state.width;
        if whole(i) {
            places[i].rows.len() * width
        } else {
            rows[i].len() * width
        }
    };
    let wanted: Vec<Wanted<'_>> = (0..places.len())
        .map(|i| Wanted {
            segment: i,
            source: PieceSource::Input,
            rows: (!whole(i)).then_some(&rows[i][..]),
            values: values(i),
            codec: case.up,
            dense_round: case.dense_round,
        })
        .collect();
    let (sent, finite) = device.encode(&wanted, 5);
    assert!(finite.iter().all(|finite| *finite));
    let mut means = Vec::new();
    for (i, place) in places.iter().enumerate() {
        let e = &expected[place.tensor];
        let all: Vec<u32> = place.rows.clone().map(|row| row as u32).collect();
        let listed = if whole(i) { &all } else { &rows[i] };
        let mut bytes = Vec::new();
        Reference.gather(
            &e.state,
            case.dense_round,
            &e.buffer,
            listed,
            case.up,
            &mut bytes,
        );
        assert!(sent[i] == bytes, "values of segment {i}");
        let mut mean = Vec::new();
        case.down
            .encode(&noise(7000 + i as u32, wanted[i].values), &mut mean);
        means.push(mean);
    }
    let flags = |i: usize| {
        let all = if whole(i) {
            CommitFlags::ALL
        } else {
            CommitFlags::default()
        };
        match case.outcome {
            Outcome::Counted => all.and(CommitFlags::COUNTED),
            Outcome::NotCounted => all,
            Outcome::Abstained => all.and(CommitFlags::ABSTAINED),
        }
    };
    let ends: Vec<End<'_>> = (0..places.len())
        .map(|i| End {
            rows: &rows[i],
            sent: &sent[i],
            up: case.up,
            mean: &means[i],
            down: case.down,
            flags: flags(i),
        })
        .collect();
    device.commit(&ends);
    for (i, place) in places.iter().enumerate() {
        let e = &mut expected[place.tensor];
        if case.outcome == Outcome::Abstained {
            e.state.withdraw(&e.buffer, place.rows.clone());
        }
        let mut mean = vec![0.0; wanted[i].values];
        case.down.decode(&means[i], &mut mean);
        let sent = (case.outcome == Outcome::Counted).then_some(&sent[i][..]);
        Reference.commit(
            &mut e.state,
            whole(i),
            &mut e.buffer,
            place.rows.clone(),
            &rows[i],
            sent,
            case.up,
            &mean,
        );
    }
    outputs.values = sent;
}

pub(crate) fn check(case: &Case) {
    let first = run(case, 0);
    assert!(
        first == run(case, 99),
        "another order of threads, other bits"
    );
}
