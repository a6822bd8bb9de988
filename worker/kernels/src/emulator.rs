//! Kernel logic on a CPU emulator: the same `.cu` sources, compiled by g++ with a shim in place of CUDA, run one thread at a time
//! in an order that a seed permutes. It finds wrong results, not slow ones, and says nothing about a GPU.
#![allow(
    unsafe_code,
    reason = "calls into a library that was compiled a moment ago; kernels take addresses"
)]

use crate::THREADS;
use core::ffi::{c_char, c_int, c_uint, c_void};
use sha2::{Digest, Sha256};
use std::ffi::CString;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the library is made of; changing any of them makes another.
const SOURCES: [&str; 13] = [
    "arc.cu",
    "arc.cuh",
    "adamw.cu",
    "codec.cuh",
    "commit.cu",
    "device.cuh",
    "energy.cu",
    "gather.cu",
    "gaussian.cu",
    "philox.cuh",
    "sketch.cu",
    "emulator/shim.h",
    "emulator/emulator.cpp",
];

const FLAGS: [&str; 14] = [
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Werror",
    // nvcc's, for which #pragma unroll is.
    "-Wno-unknown-pragmas",
    // Of the context that getcontext fills.
    "-Wno-maybe-uninitialized",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    // A fortified longjmp takes a change of stacks for an attack.
    "-U_FORTIFY_SOURCE",
    "-DARC_EMULATOR",
    "-xc++",
];

type Emulate = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    usize,
    *mut *mut c_void,
    u64,
) -> c_int;

/// Why the emulator cannot be had, or a kernel not be run.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// No compiler.
    #[error(
        "the kernels' tests compile them with g++, which could not be started: install it (Debian: apt-get install g++)"
    )]
    NoCompiler(#[source] io::Error),
    /// It refused the sources.
    #[error("g++ did not compile the kernels:\n{0}")]
    Compile(String),
    /// A file could not be read or written.
    #[error("{0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// The library could not be loaded.
    #[error("the emulator's library could not be loaded")]
    Load(#[from] libloading::Error),
    /// There is no kernel of this name.
    #[error("there is no kernel {0:?}")]
    NoKernel(String),
    /// The grid cannot be launched: empty.
    #[error("kernel {0:?} was launched with no blocks")]
    Grid(String),
}

/// The compiled kernels.
#[derive(Debug)]
pub struct Emulator {
    library: libloading::Library,
}

impl Emulator {
    /// Compiles the kernels into `directory`, unless these very sources were compiled there before, and loads them.
    ///
    /// # Errors
    /// If there is no g++, or it fails, or a file cannot be read or written.
    pub fn load(directory: &Path) -> Result<Self, EmulatorError> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let library = directory.join(format!("kernels-{}.so", hash(folder)?));
        if !library.exists() {
            compile(folder, directory, &library)?;
        }
        // SAFETY: the file was compiled from the sources beside this crate; its only initialisers fill a list of kernels.
        let library = unsafe { libloading::Library::new(&library) }?;
        Ok(Self { library })
    }

    /// Runs `blocks` blocks of a kernel; blocks and threads in an order that `seed` permutes (0: ascending).
    ///
    /// # Errors
    /// If there is no such kernel, or no block.
    ///
    /// # Safety
    /// `arguments` must be the kernel's, and every address in it valid for what the kernel reads and writes.
    pub unsafe fn launch<T: Copy>(
        &self,
        kernel: &str,
        blocks: u32,
        arguments: &T,
        seed: u64,
    ) -> Result<(), EmulatorError> {
        let name = CString::new(kernel).map_err(|_| EmulatorError::NoKernel(kernel.to_owned()))?;
        // SAFETY: emulator.cpp defines it with this signature.
        let emulate = unsafe { self.library.get::<Emulate>(b"arc_emulate\0") }?;
        let (grid, block) = ([blocks, 1, 1], [THREADS, 1, 1]);
        let mut parameters = [core::ptr::from_ref(arguments).cast_mut().cast::<c_void>()];
        // SAFETY: grid and block have three numbers, and one parameter is what every kernel has; the addresses in it are
        // the caller's promise.
        let result = unsafe {
            emulate(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                0,
                parameters.as_mut_ptr(),
                seed,
            )
        };
        match result {
            0 => Ok(()),
            1 => Err(EmulatorError::NoKernel(kernel.to_owned())),
            _ => Err(EmulatorError::Grid(kernel.to_owned())),
        }
    }
}

fn hash(folder: &Path) -> Result<String, EmulatorError> {
    let mut hasher = Sha256::new();
    for name in SOURCES {
        let path = folder.join(name);
        hasher.update(fs::read(&path).map_err(|error| EmulatorError::File(path, error))?);
    }
    for flag in FLAGS {
        hasher.update(flag);
    }
    let mut text = String::new();
    for byte in &hasher.finalize()[..8] {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// Under another name first: test processes that run at once may all compile, and none must load half a file.
fn compile(folder: &Path, directory: &Path, library: &Path) -> Result<(), EmulatorError> {
    fs::create_dir_all(directory)
        .map_err(|error| EmulatorError::File(directory.to_owned(), error))?;
    let unfinished = library.with_extension(format!("{}.tmp", std::process::id()));
    let output = Command::new("g++")
        .args(FLAGS)
        .arg("-I")
        .arg(folder)
        .arg(folder.join("arc.cu"))
        .arg(folder.join("emulator/emulator.cpp"))
        .arg("-o")
        .arg(&unfinished)
        .output()
        .map_err(EmulatorError::NoCompiler)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(EmulatorError::Compile(said));
    }
    fs::rename(&unfinished, library).map_err(|error| EmulatorError::File(library.to_owned(), error))
}
