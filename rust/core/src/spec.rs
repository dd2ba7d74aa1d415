//! The values with which state is, or is to be, initialised: fields, compared one by one.
//! The caller decides which fields count; nothing here knows their meaning.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

/// A field's value. Values of different kinds are never equal: callers normalise first.
#[derive(Debug, Clone)]
pub enum Value {
    /// `None`.
    Null,
    /// `True` or `False`.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float. A spec must equal itself, so NaN equals NaN here.
    Float(f64),
    /// Text.
    Str(String),
    /// An ordered list.
    List(Vec<Value>),
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Null, Self::Null) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a == b || (a.is_nan() && b.is_nan()),
            (Self::Str(a), Self::Str(b)) => a == b,
            (Self::List(a), Self::List(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Value {}

impl fmt::Display for Value {
    /// As Python's `repr`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("None"),
            Self::Bool(true) => f.write_str("True"),
            Self::Bool(false) => f.write_str("False"),
            Self::Int(value) => value.fmt(f),
            Self::Float(value) if value.is_nan() => f.write_str("nan"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Str(value) => write_str_repr(f, value),
            Self::List(values) => {
                f.write_char('[')?;
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        f.write_str(", ")?;
                    }
                    value.fmt(f)?;
                }
                f.write_char(']')
            }
        }
    }
}

fn write_str_repr(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    f.write_char(quote)?;
    for character in text.chars() {
        match character {
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            _ if character == quote => write!(f, "\\{character}")?,
            _ if character.is_ascii_control() => write!(f, "\\x{:02x}", u32::from(character))?,
            _ => f.write_char(character)?,
        }
    }
    f.write_char(quote)
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Str(value.into())
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::List(values.into_iter().map(Into::into).collect())
    }
}

/// Named values, ordered by name. Two specs are equal exactly if their `diff` is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spec(BTreeMap<String, Value>);

impl Spec {
    /// A spec without fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a field; returns the value it had.
    pub fn insert(&mut self, field: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        self.0.insert(field.into(), value.into())
    }

    /// A field's value.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field)
    }

    /// The fields in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(field, value)| (field.as_str(), value))
    }
}

impl<F: Into<String>, V: Into<Value>> FromIterator<(F, V)> for Spec {
    fn from_iter<I: IntoIterator<Item = (F, V)>>(fields: I) -> Self {
        Self(
            fields
                .into_iter()
                .map(|(field, value)| (field.into(), value.into()))
                .collect(),
        )
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (field, value)) in self.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{field}={value}")?;
        }
        Ok(())
    }
}

/// A field in which two specs differ; a side that lacks the field is `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldDiff {
    /// The name of the field.
    pub field: String,
    /// The existing value.
    pub existing: Option<Value>,
    /// The requested value.
    pub requested: Option<Value>,
}

impl fmt::Display for FieldDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: existing ", self.field)?;
        write_side(f, self.existing.as_ref())?;
        f.write_str(", requested ")?;
        write_side(f, self.requested.as_ref())
    }
}

fn write_side(f: &mut fmt::Formatter<'_>, value: Option<&Value>) -> fmt::Result {
    match value {
        Some(value) => write!(f, "{value}"),
        None => f.write_str("(not set)"),
    }
}

/// Every field that differs, in field order.
pub fn diff(existing: &Spec, requested: &Spec) -> Vec<FieldDiff> {
    let added = requested
        .iter()
        .filter(|(field, _)| existing.get(field).is_none());
    let mut diff: Vec<_> = existing
        .iter()
        .chain(added)
        .filter(|(field, _)| existing.get(field) != requested.get(field))
        .map(|(field, _)| FieldDiff {
            field: field.to_owned(),
            existing: existing.get(field).cloned(),
            requested: requested.get(field).cloned(),
        })
        .collect();
    diff.sort_by(|a, b| a.field.cmp(&b.field));
    diff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_print_as_python_does() {
        let cases = [
            (Value::Null, "None"),
            (true.into(), "True"),
            (false.into(), "False"),
            ((-3).into(), "-3"),
            (Value::Float(1.0), "1.0"),
            (Value::Float(f64::NAN), "nan"),
            (Value::Float(f64::NEG_INFINITY), "-inf"),
            ("nccl".into(), "'nccl'"),
            ("it's".into(), "\"it's\""),
            ("it's \"it\"".into(), "'it\\'s \"it\"'"),
            ("a\\b\n\u{1}é".into(), "'a\\\\b\\n\\x01é'"),
            (vec![0, 1].into(), "[0, 1]"),
            (
                Value::List(vec![vec![0, 1].into(), Value::List(vec![])]),
                "[[0, 1], []]",
            ),
        ];
        for (value, text) in cases {
            assert_eq!(value.to_string(), text);
        }
    }

    #[test]
    fn values_of_different_kinds_differ_and_every_value_equals_itself() {
        let values = [
            Value::Null,
            true.into(),
            1.into(),
            Value::Float(1.0),
            Value::Float(f64::NAN),
            "1".into(),
            vec![1].into(),
        ];
        for (i, a) in values.iter().enumerate() {
            for (j, b) in values.iter().enumerate() {
                assert_eq!(a == b, i == j, "{a} and {b}");
            }
        }
    }

    #[test]
    fn a_diff_names_changed_missing_and_added_fields_in_order() {
        let existing = Spec::from_iter([("tp", 2), ("a", 1), ("rank", 0)]);
        let requested = Spec::from_iter([("tp", 4), ("rank", 0), ("pp", 1)]);
        let diff = diff(&existing, &requested);
        let lines: Vec<_> = diff.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "a: existing 1, requested (not set)",
                "pp: existing (not set), requested 1",
                "tp: existing 2, requested 4",
            ]
        );
    }

    #[test]
    fn specs_are_equal_exactly_if_nothing_differs() {
        let a = Spec::from_iter([("x", Value::Float(f64::NAN)), ("y", Value::Null)]);
        let b = Spec::from_iter([("y", Value::Null), ("x", Value::Float(f64::NAN))]);
        assert_eq!(a, b);
        assert!(diff(&a, &b).is_empty());
        let c = Spec::from_iter([("x", Value::Float(f64::NAN))]);
        assert_ne!(a, c);
        assert_eq!(diff(&a, &c).len(), 1);
    }

    #[test]
    fn a_spec_prints_its_fields() {
        let mut spec = Spec::new();
        assert_eq!(spec.to_string(), "");
        assert_eq!(spec.insert("tp", 2), None);
        assert_eq!(spec.insert("tp", 4), Some(2.into()));
        spec.insert("backend", "nccl");
        assert_eq!(spec.to_string(), "backend='nccl', tp=4");
    }
}
