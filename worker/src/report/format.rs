//! Bytes, seconds and ratios for people.

/// Bytes with a decimal prefix and three significant digits: `4.19 MB`.
#[must_use]
pub fn bytes(count: f64) -> String {
    scaled(count, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// Seconds in the unit that reads best: `83 ms`, `12.3 s`, `4 min 05 s`, `2 h 10 min`.
#[must_use]
pub fn seconds(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    if value < 1e-3 {
        return format!("{:.0} µs", value * 1e6);
    }
    if value < 1.0 {
        return format!("{} ms", three_digits(value * 1e3));
    }
    if value < 100.0 {
        return format!("{} s", three_digits(value));
    }
    let whole = value.round() as u64;
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

/// Seconds as a clock shows them, for axes: `0:50`, `4:10`, `1:02:00`.
#[must_use]
pub fn clock(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return String::new();
    }
    let whole = value.round() as u64;
    let (hours, minutes, seconds) = (whole / 3600, whole % 3600 / 60, whole % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// A share below one as `1/26`, above as `1.02×`; 0 or not finite as a dash.
#[must_use]
pub fn ratio(value: f64) -> String {
    if !value.is_finite() || value <= 0.0 {
        "–".to_owned()
    } else if value > 0.67 {
        format!("{}×", three_digits(value))
    } else {
        format!("1/{}", three_digits(1.0 / value))
    }
}

/// A link's rate: `100 Mbit/s`, `1 Gbit/s`.
#[must_use]
pub fn rate(bits_per_second: f64) -> String {
    scaled(
        bits_per_second,
        1000.0,
        &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"],
    )
}

/// A count with an SI suffix and no unit: `1.06M`.
#[must_use]
pub fn count(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T"]).replace(' ', "")
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    let mut unit = 0;
    // 999.5 would be written as 1000 with three digits.
    while value.abs() >= base - 0.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    format!("{} {}", three_digits(value), units[unit])
        .trim_end()
        .to_owned()
}

/// Three significant digits, without trailing zeros after the point.
fn three_digits(value: f64) -> String {
    let magnitude = if value == 0.0 {
        0
    } else {
        value.abs().log10().floor() as i32
    };
    let decimals = (2 - magnitude).clamp(0, 6) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_well() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(4_194_304.0), "4.19 MB");
        assert_eq!(bytes(999_900.0), "1 MB");
        assert_eq!(seconds(0.0832), "83.2 ms");
        assert_eq!(seconds(12.34), "12.3 s");
        assert_eq!(seconds(245.0), "4 min 05 s");
        assert_eq!(seconds(7800.0), "2 h 10 min");
        assert_eq!(
            (clock(50.2), clock(3720.0)),
            ("0:50".into(), "1:02:00".into())
        );
        assert_eq!(ratio(1.0 / 26.4), "1/26.4");
        assert_eq!(ratio(1.0), "1×");
        assert_eq!(rate(1e9), "1 Gbit/s");
        assert_eq!(count(1_060_000.0), "1.06M");
    }

    #[test]
    fn what_is_not_a_number_is_a_dash() {
        assert_eq!(bytes(f64::NAN), "–");
        assert_eq!(seconds(f64::INFINITY), "–");
        assert_eq!(ratio(0.0), "–");
    }
}
