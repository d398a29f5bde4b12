//! placeholder
pub mod api;
pub mod manifests;
