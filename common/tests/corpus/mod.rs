//! The corpus of a fuzz target under `cargo test`: its seeds, what they are cut to, and some thousands of mutations, the
//! same on every machine. The crates that have fuzz targets share it.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

use std::path::PathBuf;

/// Makes the seeds of a target anew.
pub type Make = fn(&str) -> Vec<Vec<u8>>;

const MUTATIONS_PER_SEED: u64 = 2000;

fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(target)
}

/// The committed seeds of a target. `ARC_WRITE_SEEDS=1` writes them anew.
pub fn seeds(target: &str, make: Make) -> Vec<Vec<u8>> {
    if std::env::var_os("ARC_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(folder(target)).unwrap();
        for (at, seed) in make(target).iter().enumerate() {
            std::fs::write(folder(target).join(format!("{at:02}")), seed).unwrap();
        }
    }
    let mut paths: Vec<_> = std::fs::read_dir(folder(target))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has seeds");
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

/// SplitMix64: mutations must be the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.below(256) as u8),
            4 if !bytes.is_empty() => drop(bytes.remove(at)),
            _ => {
                let copy = bytes[at..].to_vec();
                bytes.extend_from_slice(&copy[..random.below(copy.len() + 1)]);
            }
        }
    }
}

/// Runs the seeds and what is made of them through the target's function.
pub fn run(target: &str, make: Make, entry: fn(&[u8])) {
    let mut random = Random(target.len() as u64);
    for seed in seeds(target, make) {
        entry(&seed);
        for end in 0..seed.len().min(512) {
            entry(&seed[..end]);
        }
        for _ in 0..MUTATIONS_PER_SEED {
            let mut bytes = seed.clone();
            mutate(&mut bytes, &mut random);
            entry(&bytes);
        }
    }
}
