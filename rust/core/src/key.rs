//! What the registry keeps one of.

use std::fmt;
use std::str::FromStr;

/// Names one piece of shared state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// torch's default process group and SGLang's coordinator of it.
    World,
    /// The model-parallel groups; the label is empty for those that the process shares.
    Groups(String),
    /// Expert-location metadata of one scope.
    Experts(String),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, label) = match self {
            Self::World => ("world", ""),
            Self::Groups(label) => ("groups", label.as_str()),
            Self::Experts(label) => ("experts", label.as_str()),
        };
        f.write_str(name)?;
        if label.is_empty() {
            Ok(())
        } else {
            write!(f, ":{label}")
        }
    }
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, label) = text.split_once(':').unwrap_or((text, ""));
        match (name, label) {
            ("world", "") => Ok(Self::World),
            ("groups", label) => Ok(Self::Groups(label.to_owned())),
            ("experts", label) => Ok(Self::Experts(label.to_owned())),
            _ => Err(format!(
                "unknown key {text:?}; known: world, groups, groups:NAME, experts:NAME"
            )),
        }
    }
}
