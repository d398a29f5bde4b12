//! The host's name, which is the Node's where nothing else is said.

/// The host's name cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the host's name: {0}; give it with --hostname-override")]
pub struct HostnameError(String);

/// The host's name, lower case, as the kubelet takes it for the Node's name.
pub fn node_name() -> Result<String, HostnameError> {
    let name = nix::unistd::gethostname().map_err(|errno| HostnameError(errno.to_string()))?;
    let name = name.to_string_lossy().trim().to_lowercase();
    if name.is_empty() { Err(HostnameError("it is empty".into())) } else { Ok(name) }
}
