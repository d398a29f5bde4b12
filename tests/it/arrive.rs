//! A Service that comes with chains of its own, and goes, while clients dial it: each is refused or answered,
//! and none is lost on the way to a chain that was empty when its packet set out.
//!
//! `ARRIVE_SECONDS` says for how long, of each kind.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use nftproxy::model::{Event, Kind, Protocol, Scheduler, Service, SessionAffinity};
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::reconcile::Proxy;
use nftproxy::state::State;

use crate::model::{all_listed, name, node, port, service, settings, slice};
use crate::net::{Net, POD_A, POD_B, in_netns, ip, number, patient};
use crate::serve::{Outcome, tcp_here};

/// Has the endpoints of the Service come and go until it is told to stop: how often they came.
fn come_and_go(web: Service, ready: &Sender<()>, stop: &AtomicBool) -> usize {
    let mut proxy = Proxy::new(State::new(settings(), node()), NetlinkKernel::open().unwrap());
    proxy.observe(Event::Service(web));
    all_listed().for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    ready.send(()).unwrap();
    let mut times = 0;
    while !stop.load(Relaxed) {
        for (suffix, [a, b]) in ["4", "6"].into_iter().zip([0, 1].map(|f| [POD_A[f], POD_B[f]])) {
            let slice = slice("web", suffix, &[("", Protocol::Tcp, 8080)], &[a, b]);
            proxy.observe(Event::EndpointSlice(slice));
        }
        let before = proxy.kernel_mut().generation().unwrap();
        proxy.commit().unwrap();
        let after = proxy.kernel_mut().generation().unwrap();
        assert_eq!(after, before + 1, "chains and all in one transaction");
        times += 1;
        for suffix in ["4", "6"] {
            let gone = name(&format!("web-{suffix}"));
            proxy.observe(Event::Gone(Kind::EndpointSlice, gone));
        }
        proxy.commit().unwrap();
        // So that the next time the chains are new.
        proxy.collect_idle().unwrap();
    }
    times
}

#[test]
fn a_service_that_comes_with_its_chains_is_refused_or_answers() {
    let Some(net) = Net::new() else { return };
    let vips = ["10.96.0.10", "fd00:10:96::10"];
    let plain = || service("web", &vips, &[port("", Protocol::Tcp, 80, 0)]);
    let affinity = SessionAffinity::ClientIp { timeout: 600 };
    for web in [
        Service { scheduler: Scheduler::RoundRobin, ..plain() },
        Service { session_affinity: affinity, ..plain() },
    ] {
        let stop = AtomicBool::new(false);
        let (ready, started) = mpsc::channel();
        let (times, met) = std::thread::scope(|scope| {
            let (node, stop) = (net.name("node"), &stop);
            let coming = scope.spawn(move || in_netns(&node, || come_and_go(web, &ready, stop)));
            started.recv().unwrap();
            let client = |from: &'static str, vip: &'static str| {
                let net = &net;
                scope.spawn(move || {
                    let to = SocketAddr::new(ip(vip), 80);
                    in_netns(&net.name(from), || {
                        let mut met = [0, 0];
                        while !stop.load(Relaxed) {
                            match tcp_here(to) {
                                Outcome::Refused => met[0] += 1,
                                Outcome::Answered { .. } => met[1] += 1,
                                lost @ Outcome::TimedOut => panic!("{from} to {to}: {lost:?}"),
                            }
                        }
                        met
                    })
                })
            };
            let clients = [("client", vips[0]), ("client", vips[1]), ("node", vips[0])];
            let clients = clients.map(|(from, vip)| client(from, vip));
            let until = Instant::now() + patient(Duration::from_secs(number("ARRIVE_SECONDS", 3)));
            while Instant::now() < until && !coming.is_finished() {
                std::thread::sleep(Duration::from_millis(20));
            }
            stop.store(true, Relaxed);
            let times = coming.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let met = clients.map(|client| {
                client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            (times, met)
        });
        eprintln!("came {times} times; refused and answered: {met:?}");
        assert!(times > 20 && met.as_flattened().iter().all(|met| *met > 20), "{times} {met:?}");
    }
}
