//! What is printed at the end.

use super::faults::Chaos;
use super::job::End;
use super::timeline::median;
use std::fmt::Write;

/// The table of faults, and what the job came to beside undisturbed ones.
pub(crate) fn report(chaos: &Chaos, end: &End, undisturbed: &[End]) -> String {
    let mut text =
        String::from("\n| fault | times | median stall (s) | worst (s) |\n|---|---|---|---|\n");
    for (fault, stalls) in &chaos.stalls {
        let mut sorted = stalls.clone();
        let middle = median(&mut sorted).unwrap_or(0.0);
        let worst = sorted.last().copied().unwrap_or(0.0);
        let _ = writeln!(
            text,
            "| {} | {} | {middle:.2} | {worst:.2} |",
            fault.words(),
            stalls.len()
        );
    }
    let _ = writeln!(
        text,
        "\n{} kills of {} wanted in one run of {:.0} s, {} faults in all; a step took {:.0} ms",
        chaos.kills,
        chaos.wanted,
        end.seconds,
        chaos.stalls.values().map(Vec::len).sum::<usize>(),
        end.median_step.as_secs_f64() * 1e3
    );
    let _ = writeln!(
        text,
        "{} workers reached the end with {} different digests; {} had joined again by themselves meanwhile",
        end.finished,
        end.digests.len(),
        end.rejoins
    );
    let _ = writeln!(text, "faults that did not heal in 60 s: {}", chaos.unhealed);
    let _ = writeln!(text, "{}", losses(end, undisturbed));
    for complaint in &end.complaints {
        let _ = writeln!(text, "unexpected: {complaint}");
    }
    text
}

fn losses(end: &End, undisturbed: &[End]) -> String {
    let shown = |end: &End| match end.validation {
        Some((step, loss)) => format!("{loss:.4} (step {step})"),
        None => "none".to_owned(),
    };
    let all: Vec<String> = undisturbed.iter().map(shown).collect();
    let losses = || {
        undisturbed
            .iter()
            .filter_map(|end| end.validation.map(|(_, loss)| loss))
    };
    let spread = losses().fold(f32::MIN, f32::max) - losses().fold(f32::MAX, f32::min);
    let noise = if all.len() > 1 {
        format!(", noise {spread:.4}")
    } else {
        String::new()
    };
    format!(
        "validation loss: {} disturbed; undisturbed, by seed, the first with the same: {}{noise}",
        shown(end),
        all.join(", ")
    )
}
