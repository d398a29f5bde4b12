//! What the host tells about the node and its connection tracking, and the few things that are
//! changed there.
//!
//! `name` and `addresses` count where no Node object tells them; `privilege` says in one line what the
//! process may not do, before anything fails of it, and gives up what it does not need, as `system_calls` does;
//! `conntrack` and `sysctl` set what kube-proxy sets; `memory` keeps the process small.
//! Nothing here is needed for programming Services: a host that refuses a value is reported, and
//! everything else goes on.

mod addresses;
mod conntrack;
mod memory;
mod name;
mod privilege;
mod sysctl;
mod system_calls;

pub use self::addresses::{FollowError, follow, has_ipv6, node_facts};
pub use self::conntrack::{Conntrack, describe};
pub use self::memory::keep_little_memory;
pub use self::name::{HostnameError, node_name};
pub use self::privilege::{ConfineError, PrivilegeError, check_privileges, confine};
pub use self::sysctl::{Sysctl, SysctlError};
pub use self::system_calls::{FilterError, refuse_system_calls};
