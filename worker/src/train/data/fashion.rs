//! Fashion-MNIST from its four IDX files, gzipped as the data set is distributed, or unpacked.

use super::{Batch, DataError};
use crate::train::model::IMAGE_SIDE;
use flate2::read::GzDecoder;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where Debian's package puts the files.
const DEBIAN: &str = "/usr/share/datasets/fashion-mnist";
/// Where `make data` puts them.
const FETCHED: &str = ".data/fashion-mnist";
const REMEDY: &str = "run `make data`, or install the Debian package dataset-fashion-mnist, and pass its directory with --data";
const PIXELS: usize = IMAGE_SIDE * IMAGE_SIDE;
const CLASSES: u8 = 10;
/// Largest unpacked file: the real ones are 47 MB.
const MOST_BYTES: u64 = 256 << 20;

/// Images as bytes, and their classes.
#[derive(Debug)]
struct Part {
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

/// The training and the test part.
#[derive(Debug)]
pub struct Fashion {
    train: Part,
    test: Part,
    description: String,
}

impl Fashion {
    /// Reads the four files from `directory`; without one, from where they usually are.
    ///
    /// # Errors
    /// If a file is missing, cut off, or not IDX.
    pub(super) fn load(directory: Option<&Path>) -> Result<Self, DataError> {
        let usual = [Path::new(FETCHED), Path::new(DEBIAN)];
        let directory =
            directory.unwrap_or_else(|| usual.into_iter().find(|d| d.is_dir()).unwrap_or(usual[0]));
        let (train, test) = (
            Part::load(directory, "train")?,
            Part::load(directory, "t10k")?,
        );
        let (a, b) = (train.labels.len(), test.labels.len());
        let description = format!(
            "Fashion-MNIST in {}: {a} training and {b} test images",
            directory.display()
        );
        Ok(Self {
            train,
            test,
            description,
        })
    }

    pub(super) fn description(&self) -> &str {
        &self.description
    }

    pub(super) fn training_batch(
        &self,
        mut below: impl FnMut(usize) -> usize,
        size: usize,
    ) -> Batch {
        self.train
            .batch((0..size).map(|_| below(self.train.labels.len())))
    }

    pub(super) fn validation_batches(&self, batches: usize, size: usize) -> Vec<Batch> {
        let all = self.test.labels.len();
        let images = (batches * size).min(all);
        let at: Vec<usize> = (0..images).map(|image| image * all / images).collect();
        at.chunks(size)
            .map(|at| self.test.batch(at.iter().copied()))
            .collect()
    }
}

impl Part {
    fn load(directory: &Path, part: &str) -> Result<Self, DataError> {
        let (path, images) = read(directory, &format!("{part}-images-idx3-ubyte"))?;
        let (labels_path, labels) = read(directory, &format!("{part}-labels-idx1-ubyte"))?;
        let pixels = idx(&path, &images, 3)?;
        let labels = idx(&labels_path, &labels, 1)?;
        if pixels.len() != labels.len() * PIXELS {
            let detail = format!(
                "{} pixels for {} labels of 28×28 images",
                pixels.len(),
                labels.len()
            );
            return Err(DataError::Format {
                path,
                detail,
                remedy: REMEDY,
            });
        }
        if let Some(label) = labels.iter().find(|&&label| label >= CLASSES) {
            let detail = format!("class {label}, but there are only {CLASSES}");
            return Err(DataError::Format {
                path: labels_path,
                detail,
                remedy: REMEDY,
            });
        }
        Ok(Self {
            pixels: pixels.to_vec(),
            labels: labels.to_vec(),
        })
    }

    fn batch(&self, at: impl Iterator<Item = usize>) -> Batch {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for image in at {
            pixels.extend(
                self.pixels[image * PIXELS..][..PIXELS]
                    .iter()
                    .map(|&p| f32::from(p) / 255.0),
            );
            labels.push(u32::from(self.labels[image]));
        }
        Batch::Images { pixels, labels }
    }
}

/// The unpacked bytes of `name.gz`, or of `name`.
fn read(directory: &Path, name: &str) -> Result<(PathBuf, Vec<u8>), DataError> {
    let packed = directory.join(format!("{name}.gz"));
    let plain = directory.join(name);
    if !packed.is_file() && plain.is_file() {
        let bytes = fs::read(&plain).map_err(|source| DataError::Read {
            path: plain.clone(),
            source,
        })?;
        return Ok((plain, bytes));
    }
    if !packed.is_file() {
        return Err(DataError::Missing {
            path: packed,
            remedy: REMEDY,
        });
    }
    let file = fs::File::open(&packed).map_err(|source| DataError::Read {
        path: packed.clone(),
        source,
    })?;
    let mut bytes = Vec::new();
    match GzDecoder::new(file)
        .take(MOST_BYTES)
        .read_to_end(&mut bytes)
    {
        Ok(_) => Ok((packed, bytes)),
        Err(cause) => {
            let detail = format!("not a whole gzip file ({cause})");
            Err(DataError::Format {
                path: packed,
                detail,
                remedy: REMEDY,
            })
        }
    }
}

/// The bytes behind the header of an IDX file of unsigned bytes with this many dimensions.
fn idx<'a>(path: &Path, bytes: &'a [u8], dimensions: usize) -> Result<&'a [u8], DataError> {
    let wrong = |detail: String| DataError::Format {
        path: path.to_owned(),
        detail,
        remedy: REMEDY,
    };
    let header = 4 + 4 * dimensions;
    if bytes.len() < header || bytes[..4] != [0, 0, 8, dimensions as u8] {
        return Err(wrong(format!(
            "no IDX header of {dimensions}-dimensional bytes"
        )));
    }
    let size = |at: &[u8]| u32::from_be_bytes([at[0], at[1], at[2], at[3]]) as usize;
    let sizes: Vec<usize> = bytes[4..header].chunks_exact(4).map(size).collect();
    if dimensions == 3 && sizes[1..] != [IMAGE_SIDE, IMAGE_SIDE] {
        return Err(wrong(format!(
            "images of {}×{} pixels instead of 28×28",
            sizes[1], sizes[2]
        )));
    }
    let expected = sizes
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size));
    let data = &bytes[header..];
    if expected != Some(data.len()) || data.is_empty() {
        return Err(wrong(format!(
            "cut off: {} bytes of data where the header says {sizes:?}",
            data.len()
        )));
    }
    Ok(data)
}
