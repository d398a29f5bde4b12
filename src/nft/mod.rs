//! nftables in the project's own words: typed names, elements, rules and transactions.
//!
//! Every rule and element exists once, as a value of these types. [`text`] writes it the way `nft`
//! reads it, [`netlink`] the way the kernel does; the parity test holds the two together.

pub mod connection;
pub mod dataplane;
pub mod diff;
pub mod element;
pub mod fake;
pub mod interpret;
pub mod jhash;
pub mod kernel;
pub mod names;
pub mod netlink;
pub mod rule;
pub mod ruleset;
pub mod text;
pub mod transaction;
