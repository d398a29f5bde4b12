//! The file: a `KubeProxyConfiguration`, which is read leniently where kube-proxy does so.
//!
//! An unknown field is reported and left out, as it is by kube-proxy: a typing error must not take
//! Services from a node. A known field with a value that it cannot have is an error, because what
//! would be done instead is a guess.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};
use serde_saphyr::options::DuplicateKeyPolicy;

use super::field::{FIELDS, Field};
use super::value::Value;
use super::{ConfigError, Remark};

/// A file that was read.
#[derive(Clone, Debug, Default)]
pub(super) struct File {
    pub(super) path: PathBuf,
    /// What it says, by path of the field.
    pub(super) values: BTreeMap<&'static str, Value>,
}

/// Reads a file.
pub(super) fn read(path: &Path, remarks: &mut Vec<Remark>) -> Result<File, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.into(), source })?;
    parse(path, &text, remarks)
}

/// Reads the text of a file.
pub(super) fn parse(
    path: &Path,
    text: &str,
    remarks: &mut Vec<Remark>,
) -> Result<File, ConfigError> {
    let fail = |reason: String| ConfigError::Parse { path: path.into(), reason };
    let (json, twice) = document(text).map_err(fail)?;
    if let Some(twice) = twice {
        let message = format!("{twice}; the last one counts");
        remarks.push(Remark::warning(path.display().to_string(), message));
    }
    let mut fields = match json {
        Json::Object(fields) => fields,
        // An empty file has no kind.
        Json::Null => Map::new(),
        _ => return Err(fail("expected a KubeProxyConfiguration".into())),
    };
    let mut word = |name: &str| match fields.remove(name) {
        Some(Json::String(word)) => word,
        _ => String::new(),
    };
    let (kind, version) = (word("kind"), word("apiVersion"));
    if kind != "KubeProxyConfiguration" || version != "kubeproxy.config.k8s.io/v1alpha1" {
        return Err(fail(format!(
            "kind: {kind:?} of {version:?}, expected KubeProxyConfiguration of \
             kubeproxy.config.k8s.io/v1alpha1"
        )));
    }
    let mut file = File { path: path.into(), values: BTreeMap::new() };
    file.take("", &fields, remarks)?;
    Ok(file)
}

/// The YAML or JSON in a file. Of two fields of one name the last counts, as in kube-proxy; the second
/// value says so.
fn document(text: &str) -> Result<(Json, Option<String>), String> {
    let first_line = |error: serde_saphyr::Error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        // What the library advises its caller to do is not for the user.
        let line = line.split(", set DuplicateKeyPolicy").next().unwrap_or_default();
        line.strip_prefix("error: ").unwrap_or(line).to_owned()
    };
    let strict = match serde_saphyr::from_str(text) {
        Ok(json) => return Ok((json, None)),
        Err(error) => first_line(error),
    };
    let options = serde_saphyr::options! { duplicate_keys: DuplicateKeyPolicy::LastWins };
    match serde_saphyr::from_str_with_options(text, options) {
        Ok(json) => Ok((json, Some(strict))),
        Err(_) => Err(strict),
    }
}

impl File {
    fn take(
        &mut self,
        prefix: &str,
        fields: &Map<String, Json>,
        remarks: &mut Vec<Remark>,
    ) -> Result<(), ConfigError> {
        for (name, json) in fields {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            let refuse = |expected: String| ConfigError::Value {
                origin: format!("{}: {path}", self.path.display()),
                value: json.to_string(),
                expected,
            };
            if let Some(field) = Field::at(&path) {
                if let Some(value) = field.ty.read(json).map_err(refuse)? {
                    self.values.insert(field.path, value);
                }
            } else if FIELDS.iter().any(|field| is_below(field.path, &path)) {
                match json {
                    Json::Object(fields) => self.take(&path, fields, remarks)?,
                    Json::Null => {}
                    _ => return Err(refuse("expected fields".into())),
                }
            } else {
                let origin = format!("{}: {path}", self.path.display());
                remarks.push(Remark::warning(origin, "there is no such field; it is left out"));
            }
        }
        Ok(())
    }
}

fn is_below(path: &str, group: &str) -> bool {
    path.strip_prefix(group).is_some_and(|rest| rest.starts_with('.'))
}
