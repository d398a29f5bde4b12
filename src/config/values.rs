//! Every setting with its value and where that came from.
//!
//! Precedence is kube-proxy's: with a file, only the name of the node, the API server's address and
//! the log's flags win over it, and other flags are left out, with a word about it; without one, flags
//! count. What neither says has its default.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::field::{Effect, FIELDS, Field, LONE_FLAGS};
use super::file::File;
use super::value::{Type, Value};
use super::{ConfigError, Flags, Remark};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// The host tells.
    Host,
    /// A field of the file.
    File(PathBuf, &'static str),
    /// A flag.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Host => f.write_str("host"),
            Self::File(path, field) => write!(f, "{}: {field}", path.display()),
            Self::Flag(flag) if flag.len() == 1 => write!(f, "-{flag}"),
            Self::Flag(flag) => write!(f, "--{flag}"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// The value.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

impl Setting {
    /// Whether somebody wrote something else than what there is anyway.
    pub(super) fn asks_for_more_than(&self, default: &Value) -> bool {
        let is_nothing = self.value.is_zero() && default.is_zero();
        self.origin != Origin::Default && self.value != *default && !is_nothing
    }
}

/// All settings by path.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    settings: BTreeMap<&'static str, Setting>,
    file: Option<PathBuf>,
}

impl Values {
    /// Puts flags and file together.
    pub(super) fn merge(
        flags: &Flags,
        file: Option<&File>,
        remarks: &mut Vec<Remark>,
    ) -> Result<Self, ConfigError> {
        let mut values = BTreeMap::new();
        for field in FIELDS {
            let from_flag = field.flag.and_then(|flag| given(flags, flag, field.ty)).transpose()?;
            let said = file.and_then(|file| Some((&file.path, file.values.get(field.path)?)));
            let from_file = said.filter(|(_, value)| !(field.zero_is_default && value.is_zero()));
            let counts = file.is_none() || field.is_flag_first();
            let flag = field.flag.unwrap_or_default();
            let setting = match (from_flag, from_file) {
                (Some(value), _) if counts => Setting { value, origin: Origin::Flag(flag) },
                (from_flag, Some((path, value))) => {
                    left_out(from_flag.as_ref(), flag, remarks);
                    let origin = Origin::File(path.clone(), field.path);
                    Setting { value: value.clone(), origin }
                }
                (from_flag, None) => {
                    left_out(from_flag.as_ref(), flag, remarks);
                    Setting { value: default(field), origin: Origin::Default }
                }
            };
            if let Effect::None(reason) = field.effect
                && setting.asks_for_more_than(&default(field))
            {
                let message = format!("{} has no effect: {reason}", setting.value);
                remarks.push(Remark::note(setting.origin.to_string(), message));
            }
            values.insert(field.path, setting);
        }
        for lone in LONE_FLAGS {
            if let Some(reason) = lone.without_effect
                && given(flags, lone.flag, lone.ty).transpose()?.is_some()
            {
                let origin = Origin::Flag(lone.flag).to_string();
                remarks.push(Remark::note(origin, format!("it has no effect: {reason}")));
            }
        }
        Ok(Self { settings: values, file: file.map(|file| file.path.clone()) })
    }

    /// The setting of a path of the table.
    #[must_use]
    pub fn get(&self, path: &str) -> &Setting {
        self.settings.get(path).unwrap_or_else(|| panic!("{path} is not a field of the table"))
    }

    /// Replaces a setting by what it comes down to.
    pub(super) fn settle(&mut self, path: &'static str, value: Value, origin: Origin) {
        self.settings.insert(path, Setting { value, origin });
    }

    /// Whether anybody set it.
    #[must_use]
    pub fn is_set(&self, path: &str) -> bool {
        self.get(path).origin != Origin::Default
    }

    pub(super) fn bool(&self, path: &str) -> bool {
        match self.get(path).value {
            Value::Bool(value) => value,
            ref other => unreachable!("{path} is a bool, and not {other:?}"),
        }
    }

    pub(super) fn int(&self, path: &str) -> i64 {
        match self.get(path).value {
            Value::Int(value) => value,
            ref other => unreachable!("{path} is a number, and not {other:?}"),
        }
    }

    pub(super) fn duration(&self, path: &str) -> Duration {
        match self.get(path).value {
            Value::Duration(value) => value,
            ref other => unreachable!("{path} is a duration, and not {other:?}"),
        }
    }

    pub(super) fn text(&self, path: &str) -> &str {
        match &self.get(path).value {
            Value::Text(value) => value,
            other => unreachable!("{path} is text, and not {other:?}"),
        }
    }

    pub(super) fn list(&self, path: &str) -> &[String] {
        match &self.get(path).value {
            Value::List(value) => value,
            other => unreachable!("{path} is a list, and not {other:?}"),
        }
    }

    pub(super) fn switches(&self, path: &str) -> &BTreeMap<String, bool> {
        match &self.get(path).value {
            Value::Switches(value) => value,
            other => unreachable!("{path} are switches, and not {other:?}"),
        }
    }

    /// The error that a setting has another value than expected.
    pub(super) fn refuse<T>(&self, path: &str, expected: &str) -> Result<T, ConfigError> {
        let value = match &self.get(path).value {
            Value::Text(text) => text.clone(),
            Value::List(items) => items.join(","),
            other => other.to_string(),
        };
        self.refuse_part(path, &value, expected)
    }

    /// The same for a part of it.
    pub(super) fn refuse_part<T>(
        &self,
        path: &str,
        part: &str,
        expected: &str,
    ) -> Result<T, ConfigError> {
        let origin = match (&self.get(path).origin, &self.file) {
            (Origin::Default | Origin::Host, None) => path.to_owned(),
            (Origin::Default | Origin::Host, Some(file)) => format!("{}: {path}", file.display()),
            (said, _) => said.to_string(),
        };
        Err(ConfigError::Value { origin, value: part.into(), expected: expected.into() })
    }
}

/// What counts where nothing is said.
pub(super) fn default(field: &Field) -> Value {
    field.ty.parse(field.default).unwrap_or_else(|_| Value::Text(field.default.to_owned()))
}

fn left_out(given: Option<&Value>, flag: &'static str, remarks: &mut Vec<Remark>) {
    if given.is_some() {
        let origin = Origin::Flag(flag).to_string();
        let message = "it is left out, as kube-proxy does if there is a --config";
        remarks.push(Remark::warning(origin, message));
    }
}

/// What a flag says. Of several the last counts, but lists and switches add up.
pub(super) fn given(
    flags: &Flags,
    flag: &'static str,
    ty: Type,
) -> Option<Result<Value, ConfigError>> {
    let words = flags.given.get(flag)?;
    let text = match ty {
        Type::List | Type::Switches => words.join(","),
        _ => words.last()?.clone(),
    };
    Some(ty.parse(&text).map_err(|expected| ConfigError::Value {
        origin: Origin::Flag(flag).to_string(),
        value: text,
        expected,
    }))
}
