//! Text as tokens: bytes, or those of a Hugging Face `tokenizer.json`.

use super::{Batch, DataError, builtin_text};
use arc_topk_common::config::train::TrainArgs;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

const TEXT_REMEDY: &str = "give a text file or a directory of .txt files, run `make data` to fetch some, or use `--data builtin`";
const TOKENIZER_REMEDY: &str = "give a Hugging Face tokenizer.json, or use `--tokenizer byte`";
/// Text is handed to the tokenizer in pieces of about this many bytes, cut at line ends.
const PIECE_BYTES: usize = 1 << 16;

/// Tokens of a text: a training part, and behind it a validation part.
#[derive(Debug)]
pub struct Text {
    tokens: Vec<u32>,
    /// Where the validation part starts: the last tenth, of long texts the last twentieth.
    split: usize,
    description: String,
}

impl Text {
    /// Reads and tokenizes what the settings name.
    ///
    /// # Errors
    /// If a file is missing or broken, or the text is too short for the windows.
    pub(super) fn load(args: &TrainArgs) -> Result<Self, DataError> {
        let shape = args.model_shape();
        let builtin = Path::new("builtin");
        let path = args.data.as_deref().filter(|path| *path != builtin);
        let (bytes, name) = match path {
            None => (
                builtin_text().into_bytes(),
                "built-in text (generated; not real language)".to_owned(),
            ),
            Some(path) => (read_text(path)?, path.display().to_string()),
        };
        let tokens = if args.tokenizer == "byte" {
            bytes.iter().map(|&byte| u32::from(byte)).collect()
        } else {
            tokenize(Path::new(&args.tokenizer), &bytes)?
        };
        let largest = tokens.iter().copied().max().unwrap_or(0);
        if largest as usize >= shape.vocab {
            return Err(DataError::Vocabulary {
                token: largest,
                vocab: shape.vocab,
            });
        }
        let description = format!("{name}: {} bytes, {} tokens", bytes.len(), tokens.len());
        let text = Self::new(tokens, description);
        let shorter = (text.tokens.len() - text.split).min(text.split);
        if shorter < shape.context + 1 {
            let needed = (shape.context + 1) * 10;
            let path = path.unwrap_or(builtin).to_owned();
            return Err(DataError::TooShort {
                path,
                tokens: text.tokens.len(),
                context: shape.context,
                needed,
            });
        }
        Ok(text)
    }

    pub(super) fn new(tokens: Vec<u32>, description: String) -> Self {
        let share = if tokens.len() >= 1_000_000 { 20 } else { 10 };
        let split = tokens.len() - tokens.len() / share;
        Self {
            tokens,
            split,
            description,
        }
    }

    pub(super) fn description(&self) -> &str {
        &self.description
    }

    fn batch(&self, starts: impl Iterator<Item = usize>, context: usize) -> Batch {
        let (mut inputs, mut targets, mut windows) = (Vec::new(), Vec::new(), 0);
        for start in starts {
            inputs.extend_from_slice(&self.tokens[start..start + context]);
            targets.extend_from_slice(&self.tokens[start + 1..start + context + 1]);
            windows += 1;
        }
        Batch::Tokens {
            inputs,
            targets,
            windows,
        }
    }

    pub(super) fn training_batch(
        &self,
        mut below: impl FnMut(usize) -> usize,
        size: usize,
        context: usize,
    ) -> Batch {
        self.batch((0..size).map(|_| below(self.split - context)), context)
    }

    /// Windows spread evenly over the validation part.
    pub(super) fn validation_batches(
        &self,
        batches: usize,
        size: usize,
        context: usize,
    ) -> Vec<Batch> {
        let room = self.tokens.len() - self.split - context;
        let windows = (batches * size).min(room);
        let starts: Vec<usize> = (0..windows)
            .map(|window| self.split + window * room / windows)
            .collect();
        starts
            .chunks(size)
            .map(|starts| self.batch(starts.iter().copied(), context))
            .collect()
    }
}

/// A file's bytes, or those of a directory's text files in the order of their names.
fn read_text(path: &Path) -> Result<Vec<u8>, DataError> {
    let missing = || DataError::Missing {
        path: path.to_owned(),
        remedy: TEXT_REMEDY,
    };
    let kind = fs::metadata(path).map_err(|_| missing())?;
    if kind.is_file() {
        return fs::read(path).map_err(|source| DataError::Read {
            path: path.to_owned(),
            source,
        });
    }
    let files = text_files(path)?;
    if files.is_empty() {
        return Err(missing());
    }
    let mut text = Vec::new();
    for file in files {
        let bytes = fs::read(&file).map_err(|source| DataError::Read {
            path: file.clone(),
            source,
        })?;
        text.extend_from_slice(&bytes);
        text.push(b'\n');
    }
    Ok(text)
}

fn text_files(directory: &Path) -> Result<Vec<PathBuf>, DataError> {
    let failed = |source| DataError::Read {
        path: directory.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_file() && path.extension().is_some_and(|extension| extension == "txt") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn tokenize(path: &Path, text: &[u8]) -> Result<Vec<u32>, DataError> {
    if !path.is_file() {
        return Err(DataError::Missing {
            path: path.to_owned(),
            remedy: TOKENIZER_REMEDY,
        });
    }
    let broken = |cause: tokenizers::Error| DataError::Format {
        path: path.to_owned(),
        detail: format!("not a tokenizer ({cause})"),
        remedy: TOKENIZER_REMEDY,
    };
    let tokenizer = Tokenizer::from_file(path).map_err(broken)?;
    let text = String::from_utf8_lossy(text);
    let mut tokens = Vec::new();
    let mut piece = String::new();
    for line in text.split_inclusive('\n') {
        piece.push_str(line);
        if piece.len() >= PIECE_BYTES {
            tokens.extend_from_slice(
                tokenizer
                    .encode_fast(piece.as_str(), false)
                    .map_err(broken)?
                    .get_ids(),
            );
            piece.clear();
        }
    }
    tokens.extend_from_slice(
        tokenizer
            .encode_fast(piece.as_str(), false)
            .map_err(broken)?
            .get_ids(),
    );
    Ok(tokens)
}
