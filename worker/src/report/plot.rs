//! One SVG plot from series of points.
//!
//! Fixed colours stand for roles: the page's style sheet repaints [`INK`] and [`GRID`] for light and dark, and
//! series by their position in [`SERIES`]. Text is left to the browser's own sans-serif font, so that drawing needs
//! no fonts on the machine.

use super::ReportError;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;

/// Colour of axes and labels before the style sheet repaints it.
pub const INK: RGBColor = RGBColor(1, 1, 1);
/// Colour of grid lines before the style sheet repaints it.
pub const GRID: RGBColor = RGBColor(2, 2, 2);
/// Colours of series, readable on white and on near-black.
pub const SERIES: [RGBColor; 6] = [
    RGBColor(0x3b, 0x82, 0xc4),
    RGBColor(0xe0, 0x6c, 0x2e),
    RGBColor(0x2f, 0x9e, 0x63),
    RGBColor(0xa0, 0x5f, 0xc0),
    RGBColor(0xb8, 0x8a, 0x12),
    RGBColor(0xd0, 0x4f, 0x7e),
];

const SIZE: (u32, u32) = (640, 340);

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stroke {
    /// A line, with a dot at every point.
    Dotted,
    /// A line alone.
    Line,
    /// A thin, pale line behind the others.
    Pale,
}

/// Points of one series. Those that are not finite are left out.
#[derive(Clone, Debug)]
pub struct Series {
    /// Position in [`SERIES`], modulo their number.
    pub colour: usize,
    /// How it is drawn.
    pub stroke: Stroke,
    /// x and y.
    pub points: Vec<(f64, f64)>,
}

/// A plot of several series.
#[derive(Clone, Debug)]
pub struct Plot<'a> {
    /// What it shows; also its name for screen readers.
    pub title: &'a str,
    /// Label of the x axis, with its unit.
    pub x_label: &'a str,
    /// Label of the y axis, with its unit.
    pub y_label: &'a str,
    /// Whether x is logarithmic. Points with x ≤ 0 are then left out.
    pub log_x: bool,
    /// Whether y is logarithmic. Points with y ≤ 0 are then left out.
    pub log_y: bool,
    /// Whether the y axis starts at 0.
    pub from_zero: bool,
    /// Writes a tick of the x axis.
    pub x_tick: fn(f64) -> String,
    /// Writes a tick of the y axis.
    pub y_tick: fn(f64) -> String,
    /// What is drawn, back to front.
    pub series: Vec<Series>,
}

impl Plot<'_> {
    /// Draws the plot; `None` if no series has a point that can be drawn.
    ///
    /// # Errors
    /// [`ReportError::Plot`] if the drawing library refuses.
    pub fn svg(&self) -> Result<Option<String>, ReportError> {
        let series = self.drawable();
        let points = || series.iter().flat_map(|s| s.points.iter());
        if points().next().is_none() {
            return Ok(None);
        }
        let x = span(points().map(|p| p.0), self.log_x, false);
        let y = span(points().map(|p| p.1), self.log_y, self.from_zero);
        let mut svg = String::new();
        let drawn = match (self.log_x, self.log_y) {
            (false, false) => self.draw(&mut svg, x, y, &series),
            (true, false) => self.draw(&mut svg, x.log_scale(), y, &series),
            (false, true) => self.draw(&mut svg, x, y.log_scale(), &series),
            (true, true) => self.draw(&mut svg, x.log_scale(), y.log_scale(), &series),
        };
        drawn.map_err(|error| ReportError::Plot {
            plot: self.title.to_owned(),
            detail: error.to_string(),
        })?;
        Ok(Some(scalable(&svg, self.title)))
    }

    fn drawable(&self) -> Vec<Series> {
        let keep = |&(x, y): &(f64, f64)| {
            x.is_finite() && y.is_finite() && (!self.log_x || x > 0.0) && (!self.log_y || y > 0.0)
        };
        let one = |series: &Series| Series {
            points: thin(series.points.iter().copied().filter(keep).collect()),
            ..*series
        };
        self.series.iter().map(one).collect()
    }

    fn draw<X, Y>(
        &self,
        svg: &mut String,
        x: X,
        y: Y,
        series: &[Series],
    ) -> Result<(), Box<dyn std::error::Error>>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(40)
            .x_label_area_size(50)
            .y_label_area_size(80)
            .build_cartesian_2d(x, y)?;
        let label = ("sans-serif", 17).into_font().color(&INK);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(label.clone())
            .axis_desc_style(label)
            .x_labels(6)
            .y_labels(6)
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .x_label_formatter(&|value| (self.x_tick)(*value))
            .y_label_formatter(&|value| (self.y_tick)(*value))
            .draw()?;
        for one in series {
            let colour = SERIES[one.colour % SERIES.len()];
            let style = match one.stroke {
                Stroke::Pale => colour.mix(0.5).stroke_width(1),
                Stroke::Line | Stroke::Dotted => colour.stroke_width(2),
            };
            chart.draw_series(LineSeries::new(one.points.iter().copied(), style))?;
            if one.stroke == Stroke::Dotted {
                let dot = |&point| Circle::new(point, 3, colour.filled());
                chart.draw_series(one.points.iter().map(dot))?;
            }
        }
        area.present()?;
        Ok(())
    }
}

/// The range of the values with a margin; never empty, never reversed, positive on a logarithmic axis.
fn span(values: impl Iterator<Item = f64>, log: bool, from_zero: bool) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if log {
        // Whole decades: ticks stand at powers of ten, and a range with one tick tells nothing.
        let decade = |value: f64, round: fn(f64) -> f64| 10f64.powf(round(value.log10()));
        let (low, high) = (decade(low, f64::floor), decade(high, f64::ceil));
        return low..high.max(low * 10.0);
    }
    let low = if from_zero { low.min(0.0) } else { low };
    let margin = if high > low {
        0.04 * (high - low)
    } else {
        0.5 * high.abs().max(1.0)
    };
    let bottom = if from_zero && low == 0.0 {
        0.0
    } else {
        low - margin
    };
    bottom..high + margin
}

/// At most about a thousand points: every n-th, and the last.
fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let stride = points.len().div_ceil(1000).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points.into_iter().enumerate();
    kept.filter(|(i, _)| i % stride == 0 || *i == last)
        .map(|(_, p)| p)
        .collect()
}

/// Lets the drawing grow and shrink with the page, and gives it a name.
fn scalable(svg: &str, title: &str) -> String {
    let (width, height) = SIZE;
    let fixed = format!("<svg width=\"{width}\" height=\"{height}\"");
    let title = super::html::escape(title);
    svg.replacen(
        &fixed,
        &format!("<svg role=\"img\" aria-label=\"{title}\""),
        1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(log_x: bool, log_y: bool, points: Vec<(f64, f64)>) -> Plot<'static> {
        Plot {
            title: "loss <against> steps",
            x_label: "steps",
            y_label: "loss",
            log_x,
            log_y,
            from_zero: false,
            x_tick: |v| format!("{v}"),
            y_tick: |v| format!("{v}"),
            series: vec![Series {
                colour: 0,
                stroke: Stroke::Dotted,
                points,
            }],
        }
    }

    #[test]
    fn a_plot_draws_its_points_and_names_itself() {
        let svg = plot(false, false, vec![(0.0, 3.0), (1.0, 2.0)])
            .svg()
            .unwrap()
            .unwrap();
        assert!(
            svg.starts_with("<svg role=\"img\" aria-label=\"loss &lt;against&gt; steps\""),
            "{svg}"
        );
        assert!(svg.contains("viewBox"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn odd_points_never_reach_a_path() {
        let odd = vec![
            (0.0, f64::NAN),
            (-1.0, 2.0),
            (1.0, f64::INFINITY),
            (2.0, 0.0),
            (3.0, 1.0),
        ];
        for (log_x, log_y) in [(false, false), (true, false), (false, true), (true, true)] {
            let svg = plot(log_x, log_y, odd.clone()).svg().unwrap().unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn a_single_point_and_a_flat_line_have_a_range() {
        for points in [
            vec![(5.0, 0.0)],
            vec![(0.0, 2.0), (10.0, 2.0)],
            vec![(1.0, 1.0), (1.0, 1.0)],
        ] {
            let svg = plot(false, false, points).svg().unwrap().unwrap();
            assert!(svg.contains("<circle"), "{svg}");
        }
        assert!(plot(true, true, vec![(5.0, 2.0)]).svg().unwrap().is_some());
    }

    #[test]
    fn no_points_are_no_plot() {
        assert_eq!(plot(false, false, Vec::new()).svg().unwrap(), None);
        assert_eq!(plot(true, false, vec![(0.0, 1.0)]).svg().unwrap(), None);
    }

    #[test]
    fn long_series_are_thinned_and_keep_their_end() {
        let long: Vec<(f64, f64)> = (0..5000).map(|i| (f64::from(i), 1.0)).collect();
        let thinned = thin(long);
        assert!(thinned.len() <= 1001);
        assert_eq!(thinned.last(), Some(&(4999.0, 1.0)));
    }
}
