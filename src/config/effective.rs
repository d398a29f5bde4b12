//! The effective configuration, for people and programs: every setting, its value, and who said so.

use std::fmt::Write as _;

use serde_json::{Map, Value as Json, json};

use super::field::{Effect, FIELDS};
use super::{Loaded, Origin, Value, escaped};

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A line for each setting.
    Text,
    /// One object, by path of the setting.
    Json,
}

/// Every setting with its value and origin.
#[must_use]
pub fn show(loaded: &Loaded, format: Format) -> String {
    match format {
        Format::Text => text(loaded),
        Format::Json => json(loaded),
    }
}

/// The settings that somebody set: path, value, and who.
#[must_use]
pub fn given(loaded: &Loaded) -> Vec<[String; 3]> {
    let settings = FIELDS.iter().map(|field| (field.path, loaded.values.get(field.path)));
    let set = settings.filter(|(_, s)| !matches!(s.origin, Origin::Default | Origin::Host));
    set.map(|(path, s)| [path.to_owned(), s.value.to_string(), s.origin.to_string()]).collect()
}

fn text(loaded: &Loaded) -> String {
    let rows: Vec<_> = FIELDS
        .iter()
        .map(|field| {
            let setting = loaded.values.get(field.path);
            let effect = match field.effect {
                Effect::Live => "",
                Effect::Start => "; a change needs a restart",
                Effect::None(_) => "; without effect",
            };
            (field.path, escaped(&setting.value.to_string()), format!("{}{effect}", setting.origin))
        })
        .collect();
    let width = |lens: &mut dyn Iterator<Item = usize>| lens.max().unwrap_or_default();
    let first = width(&mut rows.iter().map(|row| row.0.len()));
    let second = width(&mut rows.iter().map(|row| row.1.chars().count()).filter(|len| *len < 40));
    let mut text = String::new();
    for (path, value, origin) in rows {
        let _ = writeln!(text, "{path:first$}  {value:second$}  # {origin}");
    }
    text
}

fn json(loaded: &Loaded) -> String {
    let all: Map<String, Json> = FIELDS
        .iter()
        .map(|field| {
            let setting = loaded.values.get(field.path);
            let origin = match &setting.origin {
                Origin::Default => json!({"kind": "default"}),
                Origin::Host => json!({"kind": "host"}),
                Origin::File(file, path) => json!({"kind": "file", "file": file, "field": path}),
                Origin::Flag(flag) => json!({"kind": "flag", "flag": flag}),
            };
            let mut row = json!({"value": setting.value.to_json(), "origin": origin});
            let (effect, reason) = match field.effect {
                Effect::Live => ("live", None),
                Effect::Start => ("restart", None),
                Effect::None(reason) => ("none", Some(reason)),
            };
            row["effect"] = effect.into();
            if let Some(reason) = reason {
                row["reason"] = reason.into();
            }
            (field.path.to_owned(), row)
        })
        .collect();
    let mut text = serde_json::to_string_pretty(&all).expect("maps with text keys can be written");
    text.push('\n');
    text
}

/// The settings as a file that says the same, for `--write-config-to`.
#[must_use]
pub fn document(loaded: &Loaded) -> String {
    serde_saphyr::to_string(&file(loaded)).expect("maps with text keys can be written")
}

/// The text of `/configz`: as kube-proxy's, with what is in force since the start.
#[must_use]
pub fn configz(loaded: &Loaded) -> String {
    let mut file = file(loaded);
    file["mode"] = "nftables".into();
    file["hostnameOverride"] = loaded.config.node_name.as_str().into();
    json!({ "kubeproxy.config.k8s.io": file }).to_string()
}

/// The settings as they stand in a file.
fn file(loaded: &Loaded) -> Json {
    let mut root = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
    });
    for field in FIELDS {
        let setting = loaded.values.get(field.path);
        let is_own = field.path.starts_with("nftproxy.");
        let is_opaque = matches!(setting.value, Value::Other(_));
        let is_left_out = setting.origin == Origin::Host;
        if is_left_out || (is_own || is_opaque) && setting.value.is_zero() {
            continue;
        }
        let mut at = &mut root;
        for part in field.path.split('.') {
            at = &mut at[part];
        }
        *at = setting.value.to_json();
    }
    root
}
