//! Manifests as text, from a few words: what a user would write, without the repetition.

use std::fmt::Write as _;

/// A Service in YAML.
pub(crate) struct Svc<'a> {
    pub(crate) name: &'a str,
    pub(crate) cluster_ips: &'a [&'a str],
    /// Name, protocol, port, node port (0 for none).
    pub(crate) ports: &'a [(&'a str, &'a str, u16, u16)],
    /// Further lines of `spec`.
    pub(crate) spec: &'a [&'a str],
    /// `status.loadBalancer.ingress[].ip`
    pub(crate) balancer_ips: &'a [&'a str],
}

impl Svc<'_> {
    pub(crate) fn yaml(&self) -> String {
        let families =
            self.cluster_ips.iter().map(|a| if a.contains(':') { "IPv6" } else { "IPv4" });
        let quoted =
            |list: &[&str]| list.iter().map(|a| format!("{a:?}")).collect::<Vec<_>>().join(", ");
        let kind = if !self.balancer_ips.is_empty() {
            "LoadBalancer"
        } else if self.ports.iter().any(|port| port.3 != 0) {
            "NodePort"
        } else {
            "ClusterIP"
        };
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {}, namespace: default }}\nspec:\n  \
             type: {kind}\n  clusterIP: {:?}\n  clusterIPs: [{}]\n  ipFamilies: [{}]\n",
            self.name,
            self.cluster_ips[0],
            quoted(self.cluster_ips),
            families.collect::<Vec<_>>().join(", "),
        );
        for line in self.spec {
            writeln!(text, "  {line}").unwrap();
        }
        text.push_str("  ports:\n");
        for (name, protocol, port, node_port) in self.ports {
            write!(text, "    - {{ name: {name:?}, protocol: {protocol}, port: {port}").unwrap();
            if *node_port != 0 {
                write!(text, ", nodePort: {node_port}").unwrap();
            }
            text.push_str(" }\n");
        }
        if !self.balancer_ips.is_empty() {
            text.push_str("status:\n  loadBalancer:\n    ingress:\n");
            for address in self.balancer_ips {
                writeln!(text, "      - {{ ip: {address:?} }}").unwrap();
            }
        }
        text + "---\n"
    }
}

/// Endpoints of the test network in a family, as [`slice`] takes them: two pods of the node, one of another
/// node, and the node itself.
pub(crate) fn addresses(who: &[&str], family: usize) -> Vec<&'static str> {
    let address = |who: &&str| match *who {
        "a" => ["10.244.1.5!", "fd00:10:244:1::5!"][family],
        "b" => ["10.244.1.6!", "fd00:10:244:1::6!"][family],
        "remote" => ["10.244.2.9", "fd00:10:244:2::9"][family],
        "host" => ["192.0.2.10!", "fd00:192::10!"][family],
        other => panic!("{other}"),
    };
    who.iter().map(address).collect()
}

/// An EndpointSlice in YAML. An endpoint is an address, with a `!` if it is on `node-1`, and after a
/// blank the conditions that are true (`ready serving terminating`); without any they are unset.
pub(crate) fn slice(
    service: &str,
    suffix: &str,
    ports: &[(&str, &str, u16)],
    endpoints: &[&str],
) -> String {
    let family = if endpoints.iter().any(|e| e.contains(':')) { "IPv6" } else { "IPv4" };
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-{suffix}\n  \
         namespace: default\n  labels: {{ kubernetes.io/service-name: {service} }}\naddressType: {family}\nports:\n"
    );
    for (name, protocol, port) in ports {
        writeln!(text, "  - {{ name: {name:?}, protocol: {protocol}, port: {port} }}").unwrap();
    }
    text.push_str(if endpoints.is_empty() { "endpoints: []\n" } else { "endpoints:\n" });
    for endpoint in endpoints {
        let (address, conditions) = endpoint.split_once(' ').unwrap_or((endpoint, ""));
        let node = if address.ends_with('!') { "node-1" } else { "node-2" };
        let address = address.trim_end_matches('!');
        write!(text, "  - {{ addresses: [{address:?}], nodeName: {node}").unwrap();
        if !conditions.is_empty() {
            let is = |word| conditions.split(' ').any(|condition| condition == word);
            let [ready, serving, terminating] = ["ready", "serving", "terminating"].map(is);
            write!(
                text,
                ", conditions: {{ ready: {ready}, serving: {serving}, terminating: {terminating} }}"
            )
            .unwrap();
        }
        text.push_str(" }\n");
    }
    text + "---\n"
}

/// `node-1` with the addresses of the test network, and the address plan.
pub(crate) const CLUSTER: &str = r#"apiVersion: v1
kind: Node
metadata: { name: node-1 }
spec: { podCIDRs: [10.244.1.0/24, "fd00:10:244:1::/64"] }
status:
  addresses:
    - { type: InternalIP, address: 192.0.2.10 }
    - { type: InternalIP, address: "fd00:192::10" }
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: { name: kubernetes }
spec: { cidrs: [10.96.0.0/12, "fd00:10:96::/108"] }
---
"#;
