//! Values as they stand in files and on command lines, and what they are read as.
//!
//! The notations are kube-proxy's: Go's durations, quantities, comma-separated lists, `name=true`
//! pairs. A file says them as YAML, a flag as text; both end in the same [`Value`], so that what
//! follows does not depend on where a value came from.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use serde_json::Value as Json;

/// A value that was read.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// A span of time.
    Duration(Duration),
    /// Any text.
    Text(String),
    /// Several texts.
    List(Vec<String>),
    /// Switches by name.
    Switches(BTreeMap<String, bool>),
    /// Something that has no effect and is only kept to be shown.
    Other(Json),
}

/// What values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// `true` or `false`.
    Bool,
    /// A whole number in this range.
    Int(i64, i64),
    /// A number.
    Float,
    /// A span of time, not negative.
    Duration,
    /// Any text.
    Text,
    /// One of these texts.
    OneOf(&'static [&'static str]),
    /// A list of texts.
    List,
    /// Switches by name.
    Switches,
    /// Anything.
    Any,
}

impl Type {
    /// Reads what a file holds. None where it holds nothing; an error says what is expected.
    pub fn read(self, json: &Json) -> Result<Option<Value>, String> {
        let value = match (self, json) {
            (_, Json::Null) => return Ok(None),
            (Self::Bool, Json::Bool(value)) => Value::Bool(*value),
            (Self::Int(..), Json::Number(number)) => match number.as_i64() {
                Some(number) => self.in_range(number)?,
                None => return Err(self.expected()),
            },
            (Self::Float, Json::Number(number)) => {
                Value::Float(number.as_f64().ok_or_else(|| self.expected())?)
            }
            (Self::Duration | Self::Text | Self::OneOf(_), Json::String(text)) => {
                self.parse(text)?
            }
            (Self::List, Json::Array(items)) => {
                let text = |item: &Json| item.as_str().map(str::to_owned);
                let items: Option<Vec<_>> = items.iter().map(text).collect();
                Value::List(items.ok_or_else(|| self.expected())?)
            }
            (Self::Switches, Json::Object(map)) => {
                let switch =
                    |(name, value): (&String, &Json)| Some((name.clone(), value.as_bool()?));
                let switches: Option<BTreeMap<_, _>> = map.iter().map(switch).collect();
                Value::Switches(switches.ok_or_else(|| self.expected())?)
            }
            (Self::Any, other) => Value::Other(other.clone()),
            _ => return Err(self.expected()),
        };
        Ok(Some(value))
    }

    /// Reads what a flag says.
    pub fn parse(self, text: &str) -> Result<Value, String> {
        let expected = || self.expected();
        Ok(match self {
            // As Go's strconv.ParseBool.
            Self::Bool => match text {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => Value::Bool(true),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Value::Bool(false),
                _ => return Err(expected()),
            },
            Self::Int(..) => self.in_range(text.parse().map_err(|_| expected())?)?,
            Self::Float => Value::Float(text.parse().map_err(|_| expected())?),
            Self::Duration => Value::Duration(parse_duration(text).ok_or_else(expected)?),
            Self::Text => Value::Text(text.to_owned()),
            Self::OneOf(known) if known.contains(&text) => Value::Text(text.to_owned()),
            Self::OneOf(_) => return Err(expected()),
            Self::List => Value::List(split(text).map(str::to_owned).collect()),
            Self::Switches => {
                let pair = |pair: &str| {
                    let (name, value) = pair.split_once('=')?;
                    match Self::Bool.parse(value.trim()) {
                        Ok(Value::Bool(value)) => Some((name.trim().to_owned(), value)),
                        _ => None,
                    }
                };
                let switches: Option<BTreeMap<_, _>> = split(text).map(pair).collect();
                Value::Switches(switches.ok_or_else(expected)?)
            }
            Self::Any => Value::Other(Json::String(text.to_owned())),
        })
    }

    fn in_range(self, number: i64) -> Result<Value, String> {
        match self {
            Self::Int(low, high) if !(low..=high).contains(&number) => Err(self.expected()),
            _ => Ok(Value::Int(number)),
        }
    }

    fn expected(self) -> String {
        match self {
            Self::Bool => "expected true or false".into(),
            Self::Int(low, i64::MAX) => format!("expected a whole number, at least {low}"),
            Self::Int(low, high) => format!("expected a whole number, {low} to {high}"),
            Self::Float => "expected a number".into(),
            Self::Duration => "expected a duration like 1s or 1m30s".into(),
            Self::Text => "expected text".into(),
            Self::OneOf(known) => {
                let named: Vec<_> = known.iter().copied().filter(|k| !k.is_empty()).collect();
                match named.as_slice() {
                    [first @ .., last] if !first.is_empty() => {
                        format!("expected {} or {last}", first.join(", "))
                    }
                    _ => format!("expected {}", named.join("")),
                }
            }
            Self::List => "expected a list of texts".into(),
            Self::Switches => "expected names with true or false".into(),
            Self::Any => "expected a value".into(),
        }
    }
}

impl Value {
    /// Whether it is what Go has where nothing was written.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        match self {
            Self::Bool(value) => !value,
            Self::Int(value) => *value == 0,
            Self::Float(value) => *value == 0.0,
            Self::Duration(value) => value.is_zero(),
            Self::Text(value) => value.is_empty(),
            Self::List(value) => value.is_empty(),
            Self::Switches(value) => value.is_empty(),
            Self::Other(json) => match json {
                Json::Null => true,
                Json::Bool(value) => !value,
                Json::Number(value) => value.as_f64() == Some(0.0),
                Json::String(value) => value.is_empty() || value == "0",
                Json::Array(value) => value.is_empty(),
                Json::Object(value) => value.is_empty(),
            },
        }
    }

    /// As it stands in a file.
    #[must_use]
    pub fn to_json(&self) -> Json {
        match self {
            Self::Bool(value) => (*value).into(),
            Self::Int(value) => (*value).into(),
            Self::Float(value) => (*value).into(),
            Self::Duration(_) => self.to_string().into(),
            Self::Text(value) => value.clone().into(),
            Self::List(value) => value.clone().into(),
            Self::Switches(value) => {
                value.iter().map(|(name, value)| (name.clone(), Json::from(*value))).collect()
            }
            Self::Other(json) => json.clone(),
        }
    }
}

/// As it stands on a command line; nothing is shown as `""`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Duration(value) => f.write_str(&duration_text(*value)),
            Self::Text(value) if value.is_empty() => f.write_str("\"\""),
            Self::Text(value) => f.write_str(value),
            Self::List(value) => write!(f, "[{}]", value.join(", ")),
            Self::Switches(value) => {
                let pairs: Vec<_> = value.iter().map(|(name, on)| format!("{name}={on}")).collect();
                write!(f, "[{}]", pairs.join(", "))
            }
            Self::Other(Json::String(text)) if !text.is_empty() => f.write_str(text),
            Self::Other(json) => write!(f, "{json}"),
        }
    }
}

/// The items of a comma-separated list.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// A duration as Go writes it: numbers with units h, m, s, ms, us, ns.
fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = tail;
    }
    (!text.is_empty()).then_some(total)
}

/// A duration as Go writes it: `1h30m0s`, `250ms`.
fn duration_text(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let nanos = duration.subsec_nanos();
    if seconds == 0 && nanos > 0 {
        return match nanos {
            1_000_000.. => format!("{}ms", f64::from(nanos) / 1e6),
            1_000.. => format!("{}µs", f64::from(nanos) / 1e3),
            _ => format!("{nanos}ns"),
        };
    }
    let mut text = String::new();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    if hours > 0 {
        let _ = write!(text, "{hours}h");
    }
    if hours > 0 || minutes > 0 {
        let _ = write!(text, "{minutes}m");
    }
    let fraction = format!("{nanos:09}");
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    let _ = write!(text, "{}{point}{fraction}s", seconds % 60);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        let cases = [
            ("1s", Some(1000)),
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1500)),
            ("250ms", Some(250)),
            ("0s", Some(0)),
            ("0", Some(0)),
            ("", None),
            ("5", None),
            ("s", None),
            ("1x", None),
            ("-1s", None),
            ("99999999999999999999h", None),
        ];
        for (text, millis) in cases {
            assert_eq!(parse_duration(text), millis.map(Duration::from_millis), "{text:?}");
        }
        let written = [
            ("0s", "0s"),
            ("1h", "1h0m0s"),
            ("90s", "1m30s"),
            ("1500ms", "1.5s"),
            ("1ms", "1ms"),
            ("24h", "24h0m0s"),
        ];
        for (text, expected) in written {
            assert_eq!(duration_text(parse_duration(text).unwrap()), expected);
        }
    }

    #[test]
    fn switches_and_lists_are_read_from_both() {
        let on = Value::Switches([("A".to_owned(), true), ("B".to_owned(), false)].into());
        assert_eq!(Type::Switches.parse("A=true, B=0,").unwrap(), on);
        let json = serde_json::json!({"A": true, "B": false});
        assert_eq!(Type::Switches.read(&json).unwrap(), Some(on.clone()));
        assert_eq!(on.to_json(), json);
        assert!(Type::Switches.parse("A").is_err());
        assert!(Type::Switches.read(&serde_json::json!({"A": "true"})).is_err());
        let list = Value::List(vec!["a".into(), "b".into()]);
        assert_eq!(Type::List.parse("a,b").unwrap(), list);
        assert_eq!(Type::List.read(&serde_json::json!(["a", "b"])).unwrap(), Some(list));
        assert_eq!(Type::List.read(&Json::Null).unwrap(), None);
        let error = Type::OneOf(&["", "a", "b", "c"]).parse("d").unwrap_err();
        assert_eq!(error, "expected a, b or c");
    }
}
