//! What the owner of a Service has to know: said in the log as well, but an owner seldom reads that.

use super::NamespacedName;

/// What a notice is about. Of one Service, those of one topic are told together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// A frontend that another Service serves.
    Conflict,
    /// Something of the Service that is not served in full.
    Partly,
    /// A field that makes no sense.
    Invalid,
    /// A change that the kernel refuses.
    Refused,
    /// A health-check node port that cannot be opened.
    HealthCheck,
}

impl Topic {
    /// Whether it is the same on every node, so that one telling is enough.
    #[must_use]
    pub fn is_of_all_nodes(self) -> bool {
        matches!(self, Self::Conflict | Self::Partly | Self::Invalid)
    }
}

/// How it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is so, in so many sentences.
    Is(Vec<String>),
    /// It is no longer so.
    Over,
    /// There is no longer anything that it could be about.
    Gone,
}

/// Something about a Service that its owner has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The Service.
    pub service: NamespacedName,
    /// What it is about.
    pub topic: Topic,
    /// What of the Service, where there can be several; a later notice replaces one of the same.
    pub part: String,
    /// How it is.
    pub standing: Standing,
}

impl Notice {
    /// A notice about a Service as a whole.
    #[must_use]
    pub fn new(service: NamespacedName, topic: Topic, standing: Standing) -> Self {
        Self { service, topic, part: String::new(), standing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_objects_alone_is_the_same_on_every_node() {
        use Topic::{Conflict, HealthCheck, Invalid, Partly, Refused};
        assert!([Conflict, Partly, Invalid].into_iter().all(Topic::is_of_all_nodes));
        assert!(![Refused, HealthCheck].into_iter().any(Topic::is_of_all_nodes));
    }
}
