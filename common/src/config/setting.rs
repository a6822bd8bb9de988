//! One shape for every complaint about a setting: its name, its value, what is accepted, what to do.

use core::fmt;

/// A setting outside its range.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{name} is {value}, but must be {accepted}: {advice}")]
pub struct SettingError {
    /// The setting, as flags and TOML keys call it.
    pub name: &'static str,
    /// What it was set to.
    pub value: String,
    /// What is accepted.
    pub accepted: &'static str,
    /// What it means and what to set.
    pub advice: &'static str,
}

impl SettingError {
    /// A complaint about `name`.
    pub fn new(
        name: &'static str,
        value: impl fmt::Display,
        accepted: &'static str,
        advice: &'static str,
    ) -> Self {
        Self {
            name,
            value: value.to_string(),
            accepted,
            advice,
        }
    }
}

/// Returns the complaint unless `ok`.
///
/// # Errors
/// The complaint.
pub fn require(
    ok: bool,
    name: &'static str,
    value: impl fmt::Display,
    accepted: &'static str,
    advice: &'static str,
) -> Result<(), SettingError> {
    if ok {
        Ok(())
    } else {
        Err(SettingError::new(name, value, accepted, advice))
    }
}

/// Whether a density is in (0, 1].
///
/// # Errors
/// [`SettingError`] if not, NaN included.
pub fn check_density(density: f32) -> Result<(), SettingError> {
    let advice = "it is the share of a tensor's rows that travel in each step; 1 sends all, 0.4 and 0.2 are good starts";
    require(
        density > 0.0 && density <= 1.0,
        "density",
        density,
        "above 0 and at most 1",
        advice,
    )
}
