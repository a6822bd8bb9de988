//! Runs one piece of safe code with the widest vector instructions the machine has.
//!
//! A hot loop is written once, in safe Rust that the compiler can vectorise, and compiled three times.
//! Rust never contracts a multiplication and an addition into one rounding, and every reduction here has
//! a fixed number of lanes, so all three give the same bits (see the tests of `fast` and `codec`).

/// Instruction sets that loops are compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Level {
    /// What the target guarantees.
    Baseline,
    /// x86-64 with AVX2.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "x86-64 only"))]
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "x86-64 only"))]
    Avx512,
}

/// The widest level that this machine runs. (`std` caches the CPU's answer.)
pub(crate) fn supported() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && std::arch::is_x86_feature_detected!("avx512vl")
        {
            return Level::Avx512;
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// The level to run at: [`supported`], unless a test asked for less on this thread.
pub(crate) fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = FORCED.with(std::cell::Cell::get) {
        return level;
    }
    supported()
}

/// Asks for `values` to be brought into the cache; a hint without any effect on results.
///
/// Chosen rows lie apart, which the CPU's own prefetcher does not foresee.
#[inline(always)]
#[allow(
    unsafe_code,
    reason = "measured: sketch and gather of 25 MB into int4 on two threads take a quarter less time"
)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(unused_variables, reason = "a hint for x86-64")
)]
pub(crate) fn prefetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(16) {
        // SAFETY: SSE is part of x86-64, and a prefetch of any address neither faults nor changes memory.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                line.as_ptr().cast(),
            )
        };
    }
}

/// Writes a slice from its start on, each element once, past the caches where the CPU can (x86-64).
///
/// An ordinary store brings its line from memory before it changes it. Where all of a large array is written and nobody reads it
/// soon, that is a pass over memory for nothing, and what the cache held is gone.
#[derive(Debug)]
pub(crate) struct Stream<'a> {
    /// What is not written yet.
    rest: &'a mut [f32],
}

impl<'a> Stream<'a> {
    pub(crate) fn new(to: &'a mut [f32]) -> Self {
        Self { rest: to }
    }

    /// The next `count` elements become zeros.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn zeros(&mut self, count: usize) {
        past_caches::zeros(self.next(count));
    }

    /// The next elements become these.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn copy(&mut self, values: &[f32]) {
        past_caches::copy(self.next(values.len()), values);
    }

    fn next(&mut self, count: usize) -> &'a mut [f32] {
        let (next, rest) = core::mem::take(&mut self.rest).split_at_mut(count);
        self.rest = rest;
        next
    }
}

/// Until here the slice is borrowed, so that nobody reads it before what was streamed is there.
impl Drop for Stream<'_> {
    fn drop(&mut self) {
        past_caches::fence();
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "measured: none's commit of 25 MB at density 0.2, which is the result alone, takes a seventh less time"
)]
mod past_caches {
    use std::arch::x86_64::{__m128, _mm_loadu_ps, _mm_setzero_ps, _mm_sfence, _mm_stream_ps};

    /// What lies before the first multiple of 16 bytes, whole vectors, and the rest.
    fn aligned(to: &mut [f32]) -> (&mut [f32], &mut [__m128], &mut [f32]) {
        // SAFETY: four f32 in a row have size, and every pattern of bits, of a vector; `align_to_mut` sees to alignment.
        unsafe { to.align_to_mut() }
    }

    pub(super) fn zeros(to: &mut [f32]) {
        let (head, vectors, tail) = aligned(to);
        head.fill(0.0);
        for vector in vectors {
            // SAFETY: SSE is part of x86-64, and the reference is aligned and may be written.
            unsafe { _mm_stream_ps(core::ptr::from_mut(vector).cast(), _mm_setzero_ps()) };
        }
        tail.fill(0.0);
    }

    pub(super) fn copy(to: &mut [f32], from: &[f32]) {
        assert_eq!(to.len(), from.len(), "as many as there are places");
        let (head, vectors, tail) = aligned(to);
        let (from_head, from) = from.split_at(head.len());
        let (from_vectors, from_tail) = from.split_at(from.len() - tail.len());
        head.copy_from_slice(from_head);
        for (vector, values) in vectors.iter_mut().zip(from_vectors.as_chunks::<4>().0) {
            // SAFETY: as above; `values` are four that may be read, aligned or not.
            unsafe {
                _mm_stream_ps(
                    core::ptr::from_mut(vector).cast(),
                    _mm_loadu_ps(values.as_ptr()),
                )
            };
        }
        tail.copy_from_slice(from_tail);
    }

    /// Streamed stores of this thread come before whatever it does next.
    pub(super) fn fence() {
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() };
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod past_caches {
    pub(super) fn zeros(to: &mut [f32]) {
        to.fill(0.0);
    }

    pub(super) fn copy(to: &mut [f32], from: &[f32]) {
        to.copy_from_slice(from);
    }

    pub(super) fn fence() {}
}

#[cfg(test)]
thread_local! {
    static FORCED: std::cell::Cell<Option<Level>> = const { std::cell::Cell::new(None) };
}

/// Runs `f` with every loop called on this thread limited to each level the machine has; returns the results.
#[cfg(test)]
pub(crate) fn at_every_level<R>(f: impl Fn() -> R) -> Vec<R> {
    let mut levels = vec![Level::Baseline];
    if supported() != Level::Baseline {
        levels.push(Level::Avx2);
    }
    if supported() == Level::Avx512 {
        levels.push(Level::Avx512);
    }
    levels
        .into_iter()
        .map(|level| {
            FORCED.with(|forced| forced.set(Some(level)));
            let result = f();
            FORCED.with(|forced| forced.set(None));
            result
        })
        .collect()
}

/// Defines a function whose body is compiled for every [`Level`] and chosen at run time.
///
/// Functions that the body calls must be `#[inline(always)]` to be compiled along with it.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<const $c:ident: usize>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code, reason = "calling a function compiled for instructions that were detected")]
        #[allow(clippy::too_many_arguments, reason = "hot loops take slices")]
        $vis fn $name $(<const $c: usize>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "hot loops take slices")]
            fn body $(<const $c: usize>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
                #[allow(clippy::too_many_arguments, reason = "hot loops take slices")]
                fn avx512 $(<const $c: usize>)? ($($arg: $ty),*) $(-> $ret)? { body $(::<$c>)? ($($arg),*) }
                #[target_feature(enable = "avx2")]
                #[allow(clippy::too_many_arguments, reason = "hot loops take slices")]
                fn avx2 $(<const $c: usize>)? ($($arg: $ty),*) $(-> $ret)? { body $(::<$c>)? ($($arg),*) }
                match $crate::compress::simd::level() {
                    // SAFETY: `level` says Avx512 only after the CPU reported all four features (which imply AVX2).
                    $crate::compress::simd::Level::Avx512 => return unsafe { avx512 $(::<$c>)? ($($arg),*) },
                    // SAFETY: `level` says Avx2 only after the CPU reported AVX2.
                    $crate::compress::simd::Level::Avx2 => return unsafe { avx2 $(::<$c>)? ($($arg),*) },
                    $crate::compress::simd::Level::Baseline => {}
                }
            }
            body $(::<$c>)? ($($arg),*)
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::Stream;

    #[test]
    fn a_stream_writes_every_element_whatever_its_alignment() {
        let values: Vec<f32> = (1..200).map(|x| x as f32).collect();
        for start in 0..9 {
            for lengths in [
                vec![0],
                vec![1, 2, 3],
                vec![4, 4],
                vec![5, 0, 17, 64],
                vec![33, 1, 31],
                vec![100, 7],
            ] {
                let all: usize = lengths.iter().sum();
                let mut memory = vec![-1.0; start + all + 5];
                let mut expected = memory.clone();
                let mut stream = Stream::new(&mut memory[start..start + all]);
                let mut at = start;
                for (part, length) in lengths.into_iter().enumerate() {
                    let to = &mut expected[at..at + length];
                    if part % 2 == 0 {
                        // What is read lies at other offsets than what is written.
                        let from = &values[part..part + length];
                        stream.copy(from);
                        to.copy_from_slice(from);
                    } else {
                        stream.zeros(length);
                        to.fill(0.0);
                    }
                    at += length;
                }
                drop(stream);
                assert_eq!(memory, expected, "from {start} on");
            }
        }
    }

    #[test]
    #[should_panic(expected = "mid > len")]
    fn a_stream_ends_with_its_slice() {
        Stream::new(&mut [0.0; 7]).copy(&[1.0; 8]);
    }
}
