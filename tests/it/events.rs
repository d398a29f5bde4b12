//! What owners of Services read in `kubectl describe`: Events, made through the real API server, by nodes
//! that do not know of each other, with and without the right to make them.

use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};

use crate::control_plane::User;
use crate::e2e::{A, Cluster, REMOTE, eventually, lines, said, service, with_cluster};
use crate::net::Daemon;
use crate::objects::{CLUSTER, Svc};

const CONTESTED: &str = "198.51.100.7";

/// The program's Events: the Service, type and reason, and the note.
fn events(cluster: &Cluster<'_>) -> Vec<[String; 3]> {
    let all = cluster.runtime.block_on(async {
        let events = Api::<Event>::all(cluster.plane.client().await);
        events.list(&ListParams::default()).await.unwrap().items
    });
    let mut ours: Vec<_> = all
        .into_iter()
        .filter(|event| event.reporting_controller.as_deref() == Some("nftproxy"))
        .map(|event| {
            let regarding = event.regarding.unwrap();
            assert_eq!(regarding.kind.as_deref(), Some("Service"));
            let what = format!("{} {}", event.type_.unwrap(), event.reason.unwrap());
            [regarding.name.unwrap(), what, event.note.unwrap()]
        })
        .collect();
    ours.sort();
    ours
}

/// Waits for Events of a Service with a reason, and gives their notes.
fn told(cluster: &Cluster<'_>, service: &str, what: &str) -> Vec<String> {
    let mut notes = Vec::new();
    eventually(&format!("an Event {what} of {service}"), || {
        let all = events(cluster);
        let of = all.iter().filter(|event| event[0] == service && event[1] == what);
        notes = of.map(|event| event[2].clone()).collect();
        if notes.is_empty() { Err(format!("{all:#?}")) } else { Ok(()) }
    });
    notes
}

fn claiming<'a>(name: &'a str, address: &'a [&'a str], spec: &'a [&'a str]) -> String {
    Svc { spec, ..service(name, address) }.yaml()
}

/// Another node of the same cluster, in a namespace of its own.
fn other_node(cluster: &Cluster<'_>) -> Daemon {
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(cluster.arguments(User::KubeProxy));
    for argument in &mut arguments {
        *argument = argument.replace("node-1", "node-2");
    }
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::spawn(&cluster.net.name("client"), &arguments);
    said(&daemon, "synced");
    daemon
}

#[test]
fn owners_are_told_once_whatever_the_number_of_nodes_and_that_it_is_over() {
    with_cluster(|cluster| {
        cluster.apply(CLUSTER.split("---\n").next().unwrap());
        let daemons = [cluster.start(User::KubeProxy), other_node(cluster)];
        let external = format!("externalIPs: [{CONTESTED}]");
        let spec = [external.as_str()];
        cluster.apply(&claiming("old", &["10.96.0.70"], &spec));
        cluster.endpoints("old", &[A]);
        // Times of creation are whole seconds.
        std::thread::sleep(Duration::from_secs(2));
        cluster.apply(&claiming("young", &["10.96.0.71"], &spec));
        cluster.endpoints("young", &[REMOTE]);
        // An annotation and a weight that make no sense.
        let odd = service("odd", &["10.96.0.72"]).yaml().replacen(
            "namespace: default }",
            "namespace: default, annotations: { nftproxy.dev/scheduler: fastest } }",
            1,
        );
        cluster.apply(&odd);
        let weights = crate::objects::slice("odd", "4", &crate::e2e::HTTP, &[A]).replacen(
            "  namespace: default\n",
            "  namespace: default\n  annotations: { nftproxy.dev/weights: heavy }\n",
            1,
        );
        cluster.apply(&weights);

        let lost = told(cluster, "young", "Warning FrontendConflict");
        assert_eq!(lost.len(), 1, "one for both nodes: {lost:?}");
        let words = format!("{CONTESTED}:80/tcp is served by Service default/old");
        assert!(lost[0].starts_with(&words), "{lost:?}");
        eventually("both problems of `odd` to be told", || {
            let notes = told(cluster, "odd", "Warning InvalidField").join("\n");
            let named = ["\"fastest\"", "EndpointSlice default/odd-4"];
            if named.iter().all(|name| notes.contains(name)) { Ok(()) } else { Err(notes) }
        });
        // Changes that change nothing of it are not told again.
        for round in 0..5 {
            cluster.endpoints("young", &[if round % 2 == 0 { A } else { REMOTE }]);
        }
        cluster.delete("Service", "old");
        let over = told(cluster, "young", "Normal FrontendConflictResolved");
        assert_eq!(over.len(), 1, "{over:?}");
        cluster.answers(CONTESTED, 80, &["a"]);
        cluster.apply(&service("odd", &["10.96.0.72"]).yaml().replacen(
            "namespace: default }",
            "namespace: default, annotations: { nftproxy.dev/scheduler: maglev } }",
            1,
        ));
        cluster.delete("EndpointSlice", "odd-4");
        told(cluster, "odd", "Normal InvalidFieldCorrected");
        let all = events(cluster);
        assert!(all.iter().all(|event| ["odd", "young"].contains(&&*event[0])), "{all:#?}");
        assert!(all.len() <= 6, "{all:#?}");
        for daemon in &daemons {
            assert_eq!(lines(daemon, "Events cannot be made"), [""; 0]);
        }
        daemons.into_iter().for_each(Daemon::terminate);
        without_the_right_it_is_one_line(cluster, &spec);
    });
}

fn without_the_right_it_is_one_line(cluster: &Cluster<'_>, spec: &[&str]) {
    cluster.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\n\
         metadata: { name: nftproxy }\nrules:\n\
         \x20 - { apiGroups: [\"\", discovery.k8s.io, networking.k8s.io], \
         resources: [services, endpointslices, nodes, servicecidrs], verbs: [list, watch] }\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
         metadata: { name: nftproxy }\n\
         roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: nftproxy }\n\
         subjects: [{ kind: ServiceAccount, namespace: kube-system, name: nftproxy }]\n",
    );
    let before = events(cluster);
    let daemon = cluster.start(User::ServiceAccount);
    for i in 0..5 {
        let (name, address) = (format!("late-{i}"), format!("10.96.0.8{i}"));
        cluster.apply(&claiming(&name, &[&address], spec));
        cluster.endpoints(&name, &[A]);
    }
    said(&daemon, "Events cannot be made (403: ");
    std::thread::sleep(Duration::from_secs(5));
    let told = lines(&daemon, "Events cannot be made");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("resources: [\"events\"], verbs: [\"create\"]"), "{told:?}");
    assert_eq!(events(cluster), before);
    // The log has what they would say.
    assert!(lines(&daemon, CONTESTED).len() >= 4, "{}", daemon.log());
    daemon.terminate();
}
