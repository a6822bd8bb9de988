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
