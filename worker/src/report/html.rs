//! The page: one HTML file that needs nothing else, with its plots inside.

use super::plot::{Plot, SERIES, Series, Stroke};
use super::run::{Run, settings};
use super::{ReportError, format, table};
use crate::record::StepRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

/// Slow enough that communication decides, common enough to mean something to a reader; in bit/s.
const SLOW_LINK: f64 = 1e8;
const PHASES: [&str; 4] = ["compute", "waiting for communication", "optimizer", "other"];

/// Writes the report of `runs` to `path`, replacing what is there.
///
/// # Errors
/// [`ReportError::Plot`] if a plot cannot be drawn, [`ReportError::Write`] if the file cannot be written.
pub fn write_report(path: &Path, runs: &[Run]) -> Result<(), ReportError> {
    let page = render(runs)?;
    let write = |source| ReportError::Write {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(write)?;
    }
    std::fs::write(path, page).map_err(write)
}

/// The report of `runs` as HTML.
///
/// # Errors
/// [`ReportError::Plot`] if a plot cannot be drawn.
pub fn render(runs: &[Run]) -> Result<String, ReportError> {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = if names.is_empty() {
        "arc-topk: no runs".to_owned()
    } else {
        format!("arc-topk: {}", names.join(", "))
    };
    let mut body = heading(&title, runs);
    body += &closing(runs);
    body += "<h2>Curves</h2>";
    body += &legend(runs);
    body += "<div class=\"plots\">";
    for (plot, note) in plots(runs) {
        body += &figure(&plot, note)?;
    }
    body += "</div>";
    body += &phases(runs);
    body += &settings_table(runs);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n<style>\n{}</style>\n</head>\n<body>\n\
         <main>\n{body}\n</main>\n</body>\n</html>\n",
        escape(&title),
        include_str!("style.css")
    ))
}

/// Text for HTML content and attributes.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

fn heading(title: &str, runs: &[Run]) -> String {
    let mut html = format!("<h1>{}</h1>", escape(title));
    let mut facts = BTreeSet::new();
    for summary in runs
        .iter()
        .filter(|run| run.finished)
        .map(|run| &run.summary)
    {
        facts.insert(format!(
            "{} workers, {} shards, {} parameters. Data: {}.",
            summary.workers,
            summary.shards,
            format::count(summary.parameters as f64),
            if summary.data.is_empty() {
                "not recorded"
            } else {
                &summary.data
            }
        ));
    }
    for fact in facts {
        let _ = write!(html, "<p>{}</p>", escape(&fact));
    }
    if runs.iter().any(|run| !run.finished) {
        html += "<p>A run that is marked as cut short left no summary; its figures are those up to its last step.</p>";
    }
    html
}

fn closing(runs: &[Run]) -> String {
    if runs.is_empty() {
        return "<p>There are no runs to report.</p>".to_owned();
    }
    let rows = table::rows(runs);
    let mut html = "<h2>Result</h2><div class=\"scroll\"><table><tr><th></th>".to_owned();
    for run in runs {
        let _ = write!(html, "<th>{}</th>", escape(&run.name));
    }
    html += "</tr>";
    for (label, cells) in rows {
        html += &table_row("", &label, &cells);
    }
    html += "</table></div><p>Bytes are those of one worker, payload on the wire. Predicted: compute as measured on this \
             machine, every worker and shard behind a link of its own at that rate.</p>";
    html
}

fn table_row(class: &str, label: &str, cells: &[String]) -> String {
    let mut html = format!("<tr class=\"{class}\"><td>{}</td>", escape(label));
    for cell in cells {
        let _ = write!(html, "<td>{}</td>", escape(cell));
    }
    html + "</tr>"
}

fn hex(index: usize) -> String {
    let colour = SERIES[index % SERIES.len()];
    format!("#{:02x}{:02x}{:02x}", colour.0, colour.1, colour.2)
}

fn key(index: usize, name: &str) -> String {
    format!(
        "<span><span class=\"key\" style=\"background:{}\"></span>{}</span>",
        hex(index),
        escape(name)
    )
}

fn legend(runs: &[Run]) -> String {
    let keys: String = runs
        .iter()
        .enumerate()
        .map(|(index, run)| key(index, &run.name))
        .collect();
    format!("<div class=\"legend\">{keys}</div>")
}

fn figure(plot: &Plot<'_>, note: &str) -> Result<String, ReportError> {
    let Some(svg) = plot.svg()? else {
        return Ok(String::new());
    };
    Ok(format!(
        "<figure><figcaption>{}<span>{}</span></figcaption>{svg}</figure>",
        escape(plot.title),
        escape(note)
    ))
}

/// What is on the x axis of a loss curve: a running total over the steps.
type Progress = fn(&Run) -> Vec<f64>;

fn plots(runs: &[Run]) -> Vec<(Plot<'static>, &'static str)> {
    let whole = |v: f64| format::count(v);
    let steps: Progress = |run| run.steps.iter().map(|r| r.step as f64 + 1.0).collect();
    let moved: Progress = |run| {
        running(
            run.steps
                .iter()
                .map(|r| (r.bytes_sent + r.bytes_received) as f64),
        )
    };
    let measured: Progress = |run| running(run.steps.iter().map(|r| f64::from(r.step_seconds)));
    let predicted: Progress = |run| running(run.predicted_step_seconds(SLOW_LINK));
    let thick = "thick: validation; pale: training";
    vec![
        (
            loss_plot(runs, "Loss against steps", "steps", false, whole, steps),
            thick,
        ),
        (
            loss_plot(
                runs,
                "Loss against bytes moved",
                "bytes moved by a worker, log scale",
                true,
                format::bytes,
                moved,
            ),
            "sent and received; further left is cheaper",
        ),
        (
            loss_plot(
                runs,
                "Loss against time, measured",
                "time on this machine, min:s",
                false,
                format::clock,
                measured,
            ),
            "over whatever links this run had",
        ),
        (
            loss_plot(
                runs,
                "Loss against time, predicted at 100 Mbit/s",
                "time, min:s",
                false,
                format::clock,
                predicted,
            ),
            "compute as measured, every worker and shard behind a link of its own",
        ),
        (
            step_plot(
                runs,
                "Bytes per step",
                "bytes, log scale",
                true,
                format::bytes,
                |r| Some((r.bytes_sent + r.bytes_received) as f64),
            ),
            "sent and received by one worker",
        ),
        (
            step_plot(runs, "Energy captured", "share", false, share, |r| {
                r.captured_energy.map(f64::from)
            }),
            "share of the energy of what workers compressed (gradient and residual) that the chosen rows hold",
        ),
        (
            step_plot(
                runs,
                "Residual against gradient",
                "ratio of norms",
                false,
                share,
                |r| r.residual_ratio.map(f64::from),
            ),
            "what error feedback still holds back",
        ),
    ]
}

fn share(value: f64) -> String {
    format!("{value:.2}")
}

fn running(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let total = values.scan(0.0, |sum, value| {
        *sum += value;
        Some(*sum)
    });
    total.collect()
}

fn loss_plot(
    runs: &[Run],
    title: &'static str,
    x_label: &'static str,
    log_x: bool,
    x_tick: fn(f64) -> String,
    progress: Progress,
) -> Plot<'static> {
    let mut series = Vec::new();
    let ceiling = loss_ceiling(runs);
    for (colour, run) in runs.iter().enumerate() {
        let x = progress(run);
        let points = x.iter().copied().zip(smooth(&run.steps));
        let points = points.filter(|(_, loss)| *loss <= ceiling).collect();
        series.push(Series {
            colour,
            stroke: Stroke::Pale,
            points,
        });
    }
    for (colour, run) in runs.iter().enumerate() {
        let x = progress(run);
        let validated = run
            .steps
            .iter()
            .zip(&x)
            .filter_map(|(r, x)| Some((*x, f64::from(r.validation_loss?))));
        series.push(Series {
            colour,
            stroke: Stroke::Dotted,
            points: validated.collect(),
        });
    }
    Plot {
        title,
        x_label,
        y_label: "loss in nats",
        log_x,
        log_y: false,
        from_zero: false,
        x_tick,
        y_tick: share,
        series,
    }
}

fn step_plot(
    runs: &[Run],
    title: &'static str,
    y_label: &'static str,
    log_y: bool,
    y_tick: fn(f64) -> String,
    pick: fn(&StepRecord) -> Option<f64>,
) -> Plot<'static> {
    let one = |(colour, run): (usize, &Run)| {
        let points = run
            .steps
            .iter()
            .filter_map(|r| Some((r.step as f64 + 1.0, pick(r)?)));
        Series {
            colour,
            stroke: Stroke::Line,
            points: points.collect(),
        }
    };
    let series = runs.iter().enumerate().map(one).collect();
    Plot {
        title,
        x_label: "steps",
        y_label,
        log_x: false,
        log_y,
        from_zero: !log_y,
        x_tick: format::count,
        y_tick,
        series,
    }
}

/// Training losses above this are not drawn: the first steps of a run would flatten all that differs between runs.
fn loss_ceiling(runs: &[Run]) -> f64 {
    let validated = || {
        runs.iter()
            .flat_map(|run| run.validations().map(|(_, loss)| f64::from(loss)))
    };
    let (low, high) = validated().fold((f64::INFINITY, 0.0), |(low, high), loss| {
        (loss.min(low), loss.max(high))
    });
    if validated().count() > runs.len() {
        high + 0.5 * (high - low)
    } else {
        f64::INFINITY
    }
}

/// Training losses as a running mean over about a fiftieth of the run: single batches jump.
fn smooth(steps: &[StepRecord]) -> Vec<f64> {
    let window = (steps.len() / 50).max(1);
    let mean = |end: usize| {
        let start = (end + 1).saturating_sub(window);
        let finite: Vec<f64> = steps[start..=end]
            .iter()
            .map(|r| f64::from(r.loss))
            .filter(|loss| loss.is_finite())
            .collect();
        if finite.is_empty() {
            f64::NAN
        } else {
            finite.iter().sum::<f64>() / finite.len() as f64
        }
    };
    (0..steps.len()).map(mean).collect()
}

fn phases(runs: &[Run]) -> String {
    let longest = runs
        .iter()
        .map(|run| run.phases().iter().sum::<f64>())
        .fold(0.0, f64::max);
    if longest <= 0.0 || !longest.is_finite() {
        return String::new();
    }
    let mut html = "<h2>Time of a step by phase</h2><div class=\"legend\">".to_owned();
    PHASES
        .iter()
        .enumerate()
        .for_each(|(index, name)| html += &key(index, name));
    html += "</div><div class=\"bars\">";
    for run in runs {
        let phases = run.phases();
        let _ = write!(html, "<div>{}</div><div class=\"bar\">", escape(&run.name));
        for (index, seconds) in phases.iter().enumerate() {
            let width = 100.0 * seconds / longest;
            let label = format!("{}: {}", PHASES[index], format::seconds(*seconds));
            let _ = write!(
                html,
                "<div title=\"{}\" style=\"width:{width:.2}%;background:{}\"></div>",
                escape(&label),
                hex(index)
            );
        }
        let _ = write!(
            html,
            "</div><div>{}, compressing {}</div>",
            format::seconds(phases.iter().sum()),
            format::seconds(run.compress_seconds())
        );
    }
    html + "</div><p>Means over all steps and workers, measured on the machine of the run. Compressing goes on beside \
            computing and waiting, and is not part of the bar.</p>"
}

/// Settings of all runs, those that differ first.
fn settings_table(runs: &[Run]) -> String {
    let all: Vec<BTreeMap<String, String>> = runs
        .iter()
        .map(|run| settings(&run.summary.config))
        .collect();
    let keys: BTreeSet<&String> = all.iter().flat_map(BTreeMap::keys).collect();
    if keys.is_empty() {
        return String::new();
    }
    let cells = |key: &String| -> Vec<String> {
        all.iter()
            .map(|one| one.get(key).cloned().unwrap_or_else(|| "–".to_owned()))
            .collect()
    };
    let (differ, same): (Vec<_>, Vec<_>) = keys
        .into_iter()
        .map(|key| (key, cells(key)))
        .partition(|(_, cells)| cells.iter().any(|cell| *cell != cells[0]));
    let mut html = "<h2>Settings</h2><div class=\"scroll\"><table><tr><th></th>".to_owned();
    for run in runs {
        let _ = write!(html, "<th>{}</th>", escape(&run.name));
    }
    html += "</tr>";
    differ
        .iter()
        .for_each(|(key, cells)| html += &table_row("differs", key, cells));
    same.iter()
        .for_each(|(key, cells)| html += &table_row("", key, cells));
    html + "</table></div>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::RunSummary;

    fn synthetic(name: &str, steps: u64, sent: u64) -> Run {
        let record = |step: u64| StepRecord {
            step,
            loss: if step == 3 {
                f32::NAN
            } else {
                4.0 / (1.0 + step as f32 * 0.1)
            },
            validation_loss: step
                .is_multiple_of(10)
                .then(|| 4.1 / (1.0 + step as f32 * 0.1)),
            captured_energy: (step > 5 && name != "dense").then_some(0.8),
            step_seconds: 0.2,
            compute_seconds: 0.15,
            wait_seconds: 0.03,
            bytes_sent: sent,
            bytes_received: sent,
            dense_equivalent_bytes: 4_000_000,
            density: 0.4,
            ..StepRecord::default()
        };
        let summary = RunSummary {
            name: name.into(),
            workers: 4,
            shards: 2,
            data: "plays & <poems>".into(),
            config: serde_json::json!({"compressor": name, "steps": steps}),
            ..RunSummary::default()
        };
        Run::new(
            Some(summary),
            &[(0..steps).map(record).collect()],
            String::new(),
        )
    }

    #[test]
    fn the_page_has_its_parts_and_stands_alone() {
        let page = render(&[
            synthetic("dense", 60, 4_000_000),
            synthetic("arc", 60, 100_000),
        ])
        .unwrap();
        for part in [
            "<h2>Result</h2>",
            "<h2>Curves</h2>",
            "Loss against bytes moved",
            "Energy captured",
            "<h2>Settings</h2>",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert_eq!(
            page.matches("<figure>").count(),
            6,
            "no residual was measured, so it has no plot"
        );
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("plays &amp; &lt;poems&gt;"));
        assert!(!page.contains("NaN"), "NaN reached the page");
        assert!(
            !page.contains("src=") && !page.contains("href="),
            "the page must not load anything"
        );
        assert!(page.find("class=\"differs\"").unwrap() > page.find("<h2>Settings</h2>").unwrap());
    }

    #[test]
    fn empty_runs_and_no_runs_make_a_page() {
        let empty = Run::new(None, &[], "killed".into());
        for runs in [
            vec![],
            vec![empty.clone()],
            vec![empty, synthetic("arc", 1, 0)],
        ] {
            let page = render(&runs).unwrap();
            assert!(
                page.ends_with("</html>\n") && !page.contains("NaN") && !page.contains("inf "),
                "{page}"
            );
        }
    }

    #[test]
    fn smoothing_leaves_out_what_is_not_finite() {
        let run = synthetic("arc", 200, 1);
        assert!(smooth(&run.steps).iter().all(|loss| loss.is_finite()));
        assert!(smooth(&[]).is_empty());
    }

    #[test]
    fn a_report_that_cannot_be_written_says_where() {
        let error = write_report(Path::new("/dev/null/report.html"), &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("/dev/null/report.html"), "{error}");
    }
}
