//! nftables in the project's own words: typed names, elements, rules and transactions.
//!
//! Every rule and element exists once, as a value of these types. [`text`] writes it the way `nft`
//! reads it, [`json`] the way it prints for programs, [`netlink`] the way the kernel does; the parity
//! tests hold them together.

pub mod connection;
pub mod dataplane;
pub mod diff;
pub mod element;
pub mod fake;
pub mod interpret;
pub mod jhash;
pub mod json;
pub mod kernel;
pub mod names;
pub mod netlink;
pub mod rule;
pub mod ruleset;
pub mod text;
pub mod transaction;
