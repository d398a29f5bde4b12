//! The one integration-test binary. Tiers: what needs no privileges (render, ledger, tidy), what
//! needs network namespaces (parity, packets), and what needs a control plane (e2e).

mod adopt;
// mod control_plane;
mod ledger;
mod model;
mod namespace;
mod net;
mod objects;
mod packets;
mod parity;
mod render;
mod serve;
mod tidy;
