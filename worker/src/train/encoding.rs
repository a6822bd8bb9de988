//! A checkpoint, or a part of a snapshot, as one safetensors file that carries its own SHA-256.

use super::checkpoint::{Arrays, Checkpoint};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};

const FORMAT: &str = "arc-topk-checkpoint/2";
/// The one entry of the file's metadata, which safetensors would write in a random order: equal states must give equal
/// bytes, since two workers may store the same replica.
const ABOUT_KEY: &str = "arc_topk";

/// What a file says of itself beside its arrays, as JSON.
#[derive(Serialize, Deserialize)]
struct About {
    format: String,
    step: u64,
    update: u64,
    config: String,
    sha256: String,
}

/// The three groups of arrays under the prefixes that they have in a file.
fn groups(checkpoint: &Checkpoint) -> [(&'static str, &Arrays); 3] {
    [
        ("feedback", &checkpoint.feedback),
        ("model", &checkpoint.model),
        ("optimizer", &checkpoint.optimizer),
    ]
}

/// Hash of everything in a checkpoint.
pub(super) fn digest(checkpoint: &Checkpoint) -> String {
    let mut hash = Sha256::new();
    let mut text = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    text(FORMAT);
    text(&checkpoint.step.to_string());
    text(&checkpoint.update.to_string());
    text(&checkpoint.config);
    for (group, arrays) in groups(checkpoint) {
        for (name, values) in arrays {
            hash.update((group.len() as u64).to_le_bytes());
            hash.update(group.as_bytes());
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update((values.len() as u64).to_le_bytes());
            hash.update(to_bytes(values));
        }
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A checkpoint as one safetensors file. Hashes and copies all of it: not for the training thread.
pub(super) fn encode(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut arrays = Vec::new();
    for (group, list) in groups(checkpoint) {
        for (index, (name, values)) in list.iter().enumerate() {
            // The number keeps the order, which safetensors does not.
            arrays.push((
                format!("{group}/{index:06}/{name}"),
                vec![values.len()],
                to_bytes(values),
            ));
        }
    }
    let views = arrays.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("four bytes per value");
        (name.as_str(), view)
    });
    let about = About {
        format: FORMAT.to_owned(),
        step: checkpoint.step,
        update: checkpoint.update,
        config: checkpoint.config.clone(),
        sha256: digest(checkpoint),
    };
    let about = serde_json::to_string(&about).expect("plain fields");
    let metadata = HashMap::from([(ABOUT_KEY.to_owned(), about)]);
    safetensors::serialize(views, Some(metadata)).expect("names are unique and views are whole")
}

/// Reads what [`encode`] wrote, and checks it against its hash.
///
/// # Errors
/// What is wrong with it.
pub(super) fn decode(bytes: &[u8]) -> Result<Checkpoint, String> {
    let broken =
        |cause: safetensors::SafeTensorError| format!("not a whole safetensors file ({cause})");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let about = header.metadata().as_ref().and_then(|m| m.get(ABOUT_KEY));
    let about = about.ok_or(format!("no {ABOUT_KEY} in its header"))?;
    let about: About = serde_json::from_str(about)
        .map_err(|cause| format!("{ABOUT_KEY} in its header cannot be read ({cause})"))?;
    if about.format != FORMAT {
        return Err(format!("format {} instead of {FORMAT}", about.format));
    }
    let mut lists: [BTreeMap<String, Vec<f32>>; 3] = Default::default();
    for (name, view) in SafeTensors::deserialize(bytes).map_err(broken)?.tensors() {
        let (group, rest) = name
            .split_once('/')
            .ok_or(format!("unknown array {name}"))?;
        let list = match group {
            "feedback" => &mut lists[0],
            "model" => &mut lists[1],
            "optimizer" => &mut lists[2],
            _ => return Err(format!("unknown array {name}")),
        };
        let (values, _) = view.data().as_chunks::<4>();
        list.insert(
            rest.to_owned(),
            values
                .iter()
                .map(|value| f32::from_le_bytes(*value))
                .collect(),
        );
    }
    // The six digits sort the arrays as they were written.
    let [feedback, model, optimizer] = lists.map(|list| {
        let name = |numbered: String| {
            numbered
                .split_once('/')
                .map_or(String::new(), |(_, name)| name.to_owned())
        };
        list.into_iter()
            .map(|(numbered, values)| (name(numbered), values))
            .collect::<Arrays>()
    });
    let checkpoint = Checkpoint {
        step: about.step,
        update: about.update,
        config: about.config,
        model,
        optimizer,
        feedback,
    };
    if about.sha256 != digest(&checkpoint) {
        return Err("its SHA-256 does not match what it holds".to_owned());
    }
    Ok(checkpoint)
}
