//! The embedded machine code is what the manifest describes, and the manifest is of these sources. (Whether the compiler makes the
//! same of them again is `build.py --check`.)

use arc_topk_kernels::{FATBIN, names};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[derive(Deserialize)]
struct Manifest {
    sources: BTreeMap<String, String>,
    fatbin: Fatbin,
    kernels: BTreeMap<String, BTreeMap<String, Usage>>,
}

#[derive(Deserialize)]
struct Fatbin {
    sha256: String,
    bytes: usize,
}

#[derive(Deserialize)]
struct Usage {
    registers: u32,
    spill_bytes: u32,
    shared_bytes: u32,
}

fn manifest() -> Manifest {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("arc.fatbin.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn sha256(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_fatbin_is_the_manifests() {
    let manifest = manifest();
    assert_eq!(FATBIN.len(), manifest.fatbin.bytes);
    assert_eq!(sha256(FATBIN), manifest.fatbin.sha256);
    assert_eq!(
        FATBIN[..4],
        0xba55_ed50u32.to_le_bytes(),
        "a fat binary's mark"
    );
    assert!(FATBIN.len() < 1 << 20, "small enough to be committed");
}

#[test]
fn the_manifest_is_of_these_sources() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut now = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            now.insert(name, sha256(&fs::read(path).unwrap()));
        }
    }
    assert_eq!(
        now,
        manifest().sources,
        "run worker/kernels/build.py and commit what it writes"
    );
}

#[test]
fn every_kernel_is_there_for_every_target_and_spills_nothing() {
    let kernels = manifest().kernels;
    assert_eq!(
        kernels.keys().collect::<Vec<_>>(),
        ["sm_100", "sm_80", "sm_90"]
    );
    let mut names = names::ALL.to_vec();
    names.sort_unstable();
    for (target, used) in &kernels {
        assert_eq!(used.keys().collect::<Vec<_>>(), names, "{target}");
        for (kernel, used) in used {
            assert_eq!(used.spill_bytes, 0, "{kernel} on {target}");
            // 65,536 registers and 48 KiB (without asking for more): two blocks of 256 threads at least.
            assert!(
                used.registers <= 128 && used.shared_bytes <= 24 << 10,
                "{kernel} on {target}"
            );
        }
    }
}
