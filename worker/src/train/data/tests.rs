#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use clap::Parser;
use flate2::{Compression, write::GzEncoder};
use std::fs;
use std::io::Write;
use std::path::Path;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
}

fn args(line: &[&str]) -> TrainArgs {
    Cli::parse_from([&["test"], line].concat()).train
}

fn load_error(line: &[&str]) -> String {
    Dataset::load(&args(line)).unwrap_err().to_string()
}

#[test]
fn the_builtin_text_is_ascii_and_never_changes() {
    let text = builtin_text();
    assert!(text.is_ascii() && text.len() >= 600_000);
    assert_eq!(text, builtin_text());
    let data = Dataset::load(&args(&["--data", "builtin"])).unwrap();
    assert!(
        data.description().contains("built-in"),
        "{}",
        data.description()
    );
}

#[test]
fn a_batch_follows_from_its_key_alone() {
    let data = Dataset::load(&args(&[])).unwrap();
    let key = BatchKey {
        seed: 7,
        step: 3,
        micro_batch: 0,
        rank: 1,
    };
    let batch = data.training_batch(key, 4, 64);
    assert_eq!(batch, data.training_batch(key, 4, 64));
    for other in [
        BatchKey { seed: 8, ..key },
        BatchKey { step: 4, ..key },
        BatchKey {
            micro_batch: 1,
            ..key
        },
        BatchKey { rank: 2, ..key },
    ] {
        assert_ne!(batch, data.training_batch(other, 4, 64));
    }
    let Batch::Tokens {
        inputs,
        targets,
        windows,
    } = batch
    else {
        panic!("a text batch")
    };
    assert_eq!((inputs.len(), windows), (256, 4));
    assert_eq!(inputs[1..64], targets[..63]);
}

#[test]
fn validation_windows_lie_behind_the_training_part() {
    let tokens: Vec<u32> = (0..1000).collect();
    let text = Text::new(tokens, String::new());
    let batches = text.validation_batches(3, 4, 10);
    assert_eq!(batches.len(), 3);
    for batch in &batches {
        let Batch::Tokens { inputs, .. } = batch else {
            panic!("a text batch")
        };
        assert!(inputs.iter().all(|&token| token >= 900));
    }
    let Batch::Tokens { targets, .. } = text.training_batch(|bound| bound - 1, 1, 10) else {
        panic!("a text batch")
    };
    assert_eq!(*targets.last().unwrap(), 899);
}

#[test]
fn missing_text_names_path_and_remedy() {
    let text = load_error(&["--data", "/nowhere/text.txt"]);
    assert!(
        text.contains("/nowhere/text.txt") && text.contains("make data"),
        "{text}"
    );
    let text = load_error(&["--tokenizer", "/nowhere/tokenizer.json"]);
    assert!(
        text.contains("tokenizer.json") && text.contains("--tokenizer byte"),
        "{text}"
    );
}

#[test]
fn short_text_and_small_vocabulary_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("short.txt");
    fs::write(&path, "too short").unwrap();
    let text = load_error(&["--data", path.to_str().unwrap()]);
    assert!(
        text.contains("9 tokens") && text.contains("--context"),
        "{text}"
    );
    let text = load_error(&["--vocab", "100"]);
    assert!(text.contains("--vocab"), "{text}");
}

#[test]
fn a_directory_is_read_in_the_order_of_names() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("b.txt"), "b".repeat(3000)).unwrap();
    fs::write(dir.path().join("a.txt"), "a".repeat(3000)).unwrap();
    fs::write(dir.path().join("c.bin"), [255; 3000]).unwrap();
    let data = Dataset::load(&args(&["--data", dir.path().to_str().unwrap()])).unwrap();
    assert!(
        data.description().contains("6002 bytes"),
        "{}",
        data.description()
    );
}

#[test]
fn a_tokenizer_file_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
        "model":{"type":"WordLevel","vocab":{"[UNK]":0,"the":1,"and":2},"unk_token":"[UNK]"}}"#;
    fs::write(&path, json).unwrap();
    let data = Dataset::load(&args(&["--tokenizer", path.to_str().unwrap()])).unwrap();
    let key = BatchKey {
        seed: 0,
        step: 0,
        micro_batch: 0,
        rank: 0,
    };
    let Batch::Tokens { inputs, .. } = data.training_batch(key, 8, 64) else {
        panic!("a text batch")
    };
    assert!(inputs.contains(&1) && inputs.iter().all(|&token| token < 3));
    fs::write(&path, "{").unwrap();
    let text = load_error(&["--tokenizer", path.to_str().unwrap()]);
    assert!(text.contains("not a tokenizer"), "{text}");
}

fn write_gz(path: &Path, bytes: &[u8]) {
    let mut out = GzEncoder::new(fs::File::create(path).unwrap(), Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap();
}

/// A data set of `images` images per part, whose pixels follow from their classes.
pub(crate) fn write_fashion(directory: &Path, images: usize) {
    for part in ["train", "t10k"] {
        let count = (images as u32).to_be_bytes();
        let side = 28u32.to_be_bytes();
        let mut pixels = [&[0, 0, 8, 3][..], &count, &side, &side].concat();
        let mut labels = [&[0, 0, 8, 1][..], &count].concat();
        for image in 0..images {
            let label = (image % 10) as u8;
            labels.push(label);
            pixels.extend((0..784).map(|pixel| {
                if pixel / 79 == usize::from(label) {
                    200
                } else {
                    0
                }
            }));
        }
        write_gz(
            &directory.join(format!("{part}-images-idx3-ubyte.gz")),
            &pixels,
        );
        write_gz(
            &directory.join(format!("{part}-labels-idx1-ubyte.gz")),
            &labels,
        );
    }
}

#[test]
fn fashion_files_are_read_and_broken_ones_named() {
    let dir = tempfile::tempdir().unwrap();
    let line = ["--task", "fashion", "--data", dir.path().to_str().unwrap()];
    let text = load_error(&line);
    assert!(
        text.contains("train-images-idx3-ubyte.gz") && text.contains("dataset-fashion-mnist"),
        "{text}"
    );
    write_fashion(dir.path(), 20);
    let data = Dataset::load(&args(&line)).unwrap();
    let batches = data.validation_batches(2, 8, 0);
    let Batch::Images { pixels, labels } = &batches[0] else {
        panic!("an image batch")
    };
    assert_eq!((pixels.len(), labels.len(), batches.len()), (8 * 784, 8, 2));

    let images = dir.path().join("train-images-idx3-ubyte.gz");
    let whole = fs::read(&images).unwrap();
    fs::write(&images, &whole[..whole.len() / 2]).unwrap();
    let text = load_error(&line);
    assert!(
        text.contains("not a whole gzip file") && text.contains("make data"),
        "{text}"
    );
    write_gz(
        &images,
        &[
            &[0, 0, 8, 3][..],
            &[0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28],
            &[0; 100],
        ]
        .concat(),
    );
    let text = load_error(&line);
    assert!(text.contains("cut off"), "{text}");
}
