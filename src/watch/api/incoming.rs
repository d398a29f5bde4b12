//! Decoding that one bad object cannot stop.
//!
//! A list with one item of the wrong shape would otherwise fail as a whole, on every retry, and the
//! proxy would wait for ever. `kube`'s own guard does the same; this one also says which field it
//! was, and does not copy the object to do so.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer};

/// An object as it came, decoded or not.
#[derive(Clone, Debug)]
pub(super) enum Incoming<K> {
    Decoded(Box<K>),
    Undecodable(Box<Undecodable>),
}

/// An object that does not have the shape of its kind. Its name is known if it has one.
#[derive(Clone, Debug)]
pub(super) struct Undecodable {
    pub(super) metadata: ObjectMeta,
    pub(super) field: String,
    pub(super) message: String,
}

impl<'de, K: serde::de::DeserializeOwned> Deserialize<'de> for Incoming<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A failed decode leaves the stream in the middle of the object, so the whole object is
        // taken off it first.
        let value = serde_json::Value::deserialize(deserializer)?;
        if let Ok(object) = K::deserialize(&value) {
            return Ok(Self::Decoded(Box::new(object)));
        }
        // To know where one is in an object costs as much as all else, and is of interest only now.
        let text = |pointer: &str| value.pointer(pointer)?.as_str().map(str::to_owned);
        let metadata = ObjectMeta {
            name: text("/metadata/name"),
            namespace: text("/metadata/namespace"),
            resource_version: text("/metadata/resourceVersion"),
            uid: text("/metadata/uid"),
            ..ObjectMeta::default()
        };
        Ok(match serde_path_to_error::deserialize(&value) {
            Ok(object) => Self::Decoded(Box::new(object)),
            Err(error) => Self::Undecodable(Box::new(Undecodable {
                metadata,
                field: error.path().to_string(),
                message: error.into_inner().to_string(),
            })),
        })
    }
}

impl<K: kube::Resource> kube::Resource for Incoming<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &K::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &K::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &K::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &K::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Decoded(object) => object.meta(),
            Self::Undecodable(object) => &object.metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Decoded(object) => object.meta_mut(),
            Self::Undecodable(object) => &mut object.metadata,
        }
    }
}
