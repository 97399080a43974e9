//! What is measured, what it is compared with, and how it is shown.

use serde::Serialize;

/// What the ratio of a figure to its baseline should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Not more (times, sizes).
    AtMost(f64),
    /// Not less (rates).
    AtLeast(f64),
}

impl Target {
    /// Whether `ratio` reaches the target.
    #[must_use]
    pub fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(most) => ratio <= most,
            Self::AtLeast(least) => ratio >= least,
        }
    }
}

/// What a figure is, before it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Its name: the suite, a dot, what is measured.
    pub name: &'static str,
    /// The unit of its value and its baseline's.
    pub unit: &'static str,
    /// What it is compared with; empty for floors, which are what others are compared with.
    pub baseline: &'static str,
    /// Which ratio is wanted, if any is.
    pub target: Option<Target>,
}

/// What came of measuring one figure.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The figure's name.
    pub name: &'static str,
    /// Its value.
    pub value: f64,
    /// Its baseline's, measured next to it; none for floors.
    pub baseline: Option<f64>,
    /// What a reader should know.
    pub note: Option<String>,
}

impl Reading {
    /// A floor.
    #[must_use]
    pub fn floor(name: &'static str, value: f64) -> Self {
        Self { name, value, baseline: None, note: None }
    }

    /// A figure beside its baseline.
    #[must_use]
    pub fn beside(name: &'static str, value: f64, baseline: f64) -> Self {
        Self { name, value, baseline: Some(baseline), note: None }
    }

    /// The same with a note.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

/// A figure as it is reported: measured, or with the reason why not.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Its name.
    pub name: &'static str,
    /// Its value; none: it could not be measured, and `note` says why.
    pub value: Option<f64>,
    /// The unit.
    pub unit: &'static str,
    /// What it is compared with.
    pub baseline: &'static str,
    /// The baseline's value.
    pub baseline_value: Option<f64>,
    /// Value by baseline.
    pub ratio: Option<f64>,
    /// Which ratio is wanted.
    pub target: Option<Target>,
    /// Whether it is; none without a target or a value.
    pub met: Option<bool>,
    /// What a reader should know.
    pub note: Option<String>,
}

impl Figure {
    /// A figure that was measured.
    #[must_use]
    pub fn measured(spec: &Spec, reading: Reading) -> Self {
        let ratio = reading.baseline.filter(|base| *base > 0.0).map(|base| reading.value / base);
        let met = spec.target.zip(ratio).map(|(target, ratio)| target.is_met(ratio));
        Self {
            name: spec.name,
            value: Some(reading.value),
            unit: spec.unit,
            baseline: spec.baseline,
            baseline_value: reading.baseline,
            ratio,
            target: spec.target,
            met,
            note: reading.note,
        }
    }

    /// A figure that could not be measured, and why.
    #[must_use]
    pub fn missing(spec: &Spec, why: impl Into<String>) -> Self {
        Self {
            name: spec.name,
            value: None,
            unit: spec.unit,
            baseline: spec.baseline,
            baseline_value: None,
            ratio: None,
            target: spec.target,
            met: None,
            note: Some(why.into()),
        }
    }
}

/// The figures as a table for people.
#[must_use]
pub fn table(figures: &[Figure]) -> String {
    let number = |value: Option<f64>| match value {
        None => "-".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    };
    let mut rows =
        vec![["figure", "value", "unit", "baseline", "its value", "ratio", "target", ""].map(str::to_owned)];
    for f in figures {
        let target = match f.target {
            None => String::new(),
            Some(Target::AtMost(most)) => format!("<= {most}"),
            Some(Target::AtLeast(least)) => format!(">= {least}"),
        };
        let verdict = match (f.met, f.value) {
            (Some(true), _) => "met",
            (Some(false), _) => "MISSED",
            (None, None) => "not measured",
            (None, Some(_)) => "",
        };
        rows.push([
            f.name.to_owned(),
            number(f.value),
            f.unit.to_owned(),
            f.baseline.to_owned(),
            number(f.baseline_value),
            f.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            target,
            verdict.to_owned(),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..8).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let padded =
                if matches!(at, 1 | 4 | 5) { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            text.push_str(&padded);
            text.push_str("  ");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    for f in figures {
        if let Some(note) = &f.note {
            text.push_str(&format!("{}: {note}\n", f.name));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: Spec = Spec { name: "a.b", unit: "us", baseline: "bare", target: Some(Target::AtMost(1.25)) };

    #[test]
    fn a_figure_is_met_by_its_ratio_to_the_baseline() {
        let at = |value| Figure::measured(&SPEC, Reading::beside("a.b", value, 100.0));
        assert_eq!((at(125.0).met, at(126.0).met), (Some(true), Some(false)));
        assert!(Target::AtLeast(1.5).is_met(1.5) && !Target::AtLeast(1.5).is_met(1.49));
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed_and_says_why() {
        let figure = Figure::missing(&SPEC, "there is no TAP");
        assert_eq!((figure.value, figure.met), (None, None));
        let text = table(&[figure]);
        assert!(text.contains("not measured") && text.contains("a.b: there is no TAP"), "{text}");
    }
}
