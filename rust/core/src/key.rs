//! Names of the shared pieces of process-wide state.

use std::fmt;
use std::str::FromStr;

/// State that is initialised once: the world, settings of the whole process, a patch of torch,
/// its profiler, model-parallel groups, expert-location metadata, weights.
///
/// The string is a scope's label; the empty label is the process's default scope.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// torch's default process group and SGLang's coordinator of it.
    World,
    /// Settings that are applied to the whole process and never undone.
    Process,
    /// SGLang's patch of `torch.multiprocessing.reductions`.
    Reductions,
    /// torch's profiler, while it records.
    Profiler,
    /// A scope's model-parallel groups.
    Groups(String),
    /// A scope's expert-location metadata.
    Experts(String),
    /// Weights that several runners share; the string is the number of the sharing.
    Weights(String),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, label) = match self {
            Self::World => ("world", ""),
            Self::Process => ("process", ""),
            Self::Reductions => ("reductions", ""),
            Self::Profiler => ("profiler", ""),
            Self::Groups(label) => ("groups", label.as_str()),
            Self::Experts(label) => ("experts", label.as_str()),
            Self::Weights(number) => ("weights", number.as_str()),
        };
        f.write_str(name)?;
        if !label.is_empty() {
            write!(f, ":{label}")?;
        }
        Ok(())
    }
}

impl FromStr for Key {
    type Err = String;

    /// The exact inverse of `Display`: `groups:` is refused.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, label) = text.split_once(':').unwrap_or((text, ""));
        match (name, label) {
            _ if text.ends_with(':') && label.is_empty() => None,
            ("world", "") => Some(Self::World),
            ("process", "") => Some(Self::Process),
            ("reductions", "") => Some(Self::Reductions),
            ("profiler", "") => Some(Self::Profiler),
            ("groups", label) => Some(Self::Groups(label.into())),
            ("experts", label) => Some(Self::Experts(label.into())),
            ("weights", number) if !number.is_empty() => Some(Self::Weights(number.into())),
            _ => None,
        }
        .ok_or_else(|| {
            format!(
                "unknown key {text:?}; known: world, process, reductions, profiler, groups, \
                 groups:NAME, experts, experts:NAME, weights:NUMBER"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_parsed_from_what_it_prints() {
        let keys = [
            (Key::World, "world"),
            (Key::Process, "process"),
            (Key::Reductions, "reductions"),
            (Key::Profiler, "profiler"),
            (Key::Groups(String::new()), "groups"),
            (Key::Groups("draft".into()), "groups:draft"),
            (Key::Groups("a:b".into()), "groups:a:b"),
            (Key::Experts(String::new()), "experts"),
            (Key::Experts("moe".into()), "experts:moe"),
            (Key::Weights("1".into()), "weights:1"),
        ];
        for (key, text) in keys {
            assert_eq!(key.to_string(), text);
            assert_eq!(text.parse(), Ok(key));
        }
    }

    #[test]
    fn text_that_no_key_prints_is_refused() {
        for text in [
            "", "World", "world:", "world:x", "groups:", "weights", ":x", "tp",
        ] {
            let error = text.parse::<Key>().unwrap_err();
            assert!(error.contains(text));
        }
    }
}
