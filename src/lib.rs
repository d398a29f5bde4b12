//! nftproxy: a Kubernetes service proxy on nftables. (Module list follows as it grows.)
pub mod model;
pub mod watch;
