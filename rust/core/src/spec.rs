//! What a caller asks for, as named values, and where two requests differ.

use std::collections::BTreeMap;
use std::fmt;

/// One value of a spec.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Absent on purpose (Python's None).
    Null,
    /// True or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number. Compared bit by bit but for NaN, which equals itself here.
    Float(f64),
    /// Text.
    Str(String),
    /// Values in order.
    List(Vec<Value>),
}

impl fmt::Display for Value {
    /// As Python writes it: the readers of messages are Python programmers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("None"),
            Self::Bool(true) => f.write_str("True"),
            Self::Bool(false) => f.write_str("False"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Str(value) => write!(f, "'{value}'"),
            Self::List(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        f.write_str(", ")?;
                    }
                    write!(f, "{value}")?;
                }
                f.write_str("]")
            }
        }
    }
}

impl Value {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Float(a), Self::Float(b)) => a == b || (a.is_nan() && b.is_nan()),
            (Self::List(a), Self::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b))
            }
            _ => self == other,
        }
    }
}

/// Named values that two requests must agree on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Spec(BTreeMap<String, Value>);

impl Spec {
    /// Sets one field.
    pub fn insert(&mut self, field: impl Into<String>, value: Value) {
        self.0.insert(field.into(), value);
    }

    /// The value of one field.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field)
    }

    /// All fields, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(field, value)| (field.as_str(), value))
    }
}

impl<F: Into<String>> FromIterator<(F, Value)> for Spec {
    fn from_iter<I: IntoIterator<Item = (F, Value)>>(fields: I) -> Self {
        Self(fields.into_iter().map(|(f, v)| (f.into(), v)).collect())
    }
}

/// One field in which two specs differ.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldDiff {
    /// Its name.
    pub field: String,
    /// The value of the state that exists, if it has the field.
    pub existing: Option<Value>,
    /// The value that was asked for, if the request has the field.
    pub requested: Option<Value>,
}

/// Every field in which `requested` differs from `existing`, by name. Empty when they are equal.
pub fn diff(existing: &Spec, requested: &Spec) -> Vec<FieldDiff> {
    let mut fields: Vec<&String> = existing.0.keys().chain(requested.0.keys()).collect();
    fields.sort_unstable();
    fields.dedup();
    fields
        .into_iter()
        .filter(
            |field| match (existing.0.get(*field), requested.0.get(*field)) {
                (Some(a), Some(b)) => !a.same(b),
                _ => true,
            },
        )
        .map(|field| FieldDiff {
            field: field.clone(),
            existing: existing.0.get(field).cloned(),
            requested: requested.0.get(field).cloned(),
        })
        .collect()
}
