//! Notifications of large commits, which nobody is to listen to: each would cost the kernel a page. What others
//! commit meanwhile is noticed all the same.

use std::time::{Duration, Instant};

use nftproxy::drift;
use nftproxy::model::{Event, Family, Kind, Protocol};
use nftproxy::nft::element::{ElementId, Key, Value};
use nftproxy::nft::kernel::Kernel as _;
use nftproxy::nft::names::SetName;
use nftproxy::nft::netlink::NetlinkKernel;
use nftproxy::nft::transaction::{Op, Transaction};
use nftproxy::reconcile::Proxy;
use nftproxy::state::State;

use crate::model::{all_listed, name, node, port, service, settings, slice};
use crate::namespace::in_namespace;
use crate::net::wait_until;

/// Services that come and go at once.
const MANY: u8 = 200;

fn proxy() -> Proxy<NetlinkKernel> {
    let mut proxy = Proxy::new(State::new(settings(), node()), NetlinkKernel::open().unwrap());
    all_listed().for_each(|event| proxy.observe(event));
    proxy.commit().unwrap();
    proxy
}

fn come(proxy: &mut Proxy<NetlinkKernel>, services: std::ops::Range<u8>) {
    for n in services {
        let name = format!("web-{n}");
        let ports = [port("", Protocol::Tcp, 80, 0)];
        proxy.observe(Event::Service(service(&name, &[&format!("10.96.0.{n}")], &ports)));
        let slice = slice(&name, "4", &[("", Protocol::Tcp, 8080)], &["10.244.1.5"]);
        proxy.observe(Event::EndpointSlice(slice));
    }
    proxy.commit().unwrap();
}

fn go(proxy: &mut Proxy<NetlinkKernel>, services: std::ops::Range<u8>) {
    for n in services {
        proxy.observe(Event::Gone(Kind::Service, name(&format!("web-{n}"))));
    }
    proxy.commit().unwrap();
}

/// Bytes that wait for the one socket of this namespace that is subscribed to notifications.
fn waiting() -> u64 {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let columns = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let of_netfilter: Vec<_> =
        columns.filter(|columns| columns[1] == "12" && columns[3] == "00000040").collect();
    let [monitor] = &of_netfilter[..] else { panic!("{sockets}") };
    monitor[4].parse().unwrap()
}

#[test]
fn nobody_is_told_of_a_large_commit_of_our_own() {
    in_namespace(|| {
        let mut proxy = proxy();
        let _monitor = proxy.kernel_mut().monitor().unwrap();
        assert_eq!(waiting(), 0);
        come(&mut proxy, 1..MANY);
        go(&mut proxy, 1..MANY);
        assert_eq!(waiting(), 0);
        assert!(!proxy.kernel_mut().take_unheard());
        come(&mut proxy, 1..2);
        assert!(waiting() > 0);
        assert!(!proxy.kernel_mut().take_unheard());
    });
}

#[test]
fn what_others_commit_during_a_large_one_is_noticed() {
    in_namespace(|| {
        let mut proxy = proxy();
        let mut told = drift::watch(proxy.kernel_mut().monitor().unwrap()).unwrap();
        let (mut heard, mut unheard) = (0, 0);
        let mut took = Duration::from_millis(10);
        for round in 0..2000_u32 {
            let key = Key::Address([10, 96, 7, 7].into());
            let id = ElementId { family: Family::V4, set: SetName::ClusterIps, key };
            let op = if round % 2 == 0 { Op::AddElement } else { Op::DeleteElement };
            let change = Transaction { ops: vec![op(id, Value::None)] };
            let began = Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // At some time of what the last round took.
                    std::thread::sleep(took * (round * 37 % 100) / 100);
                    NetlinkKernel::open().unwrap().apply(&change).unwrap();
                });
                come(&mut proxy, 1..MANY);
                go(&mut proxy, 1..MANY);
            });
            took = began.elapsed();
            if proxy.kernel_mut().take_unheard() {
                unheard += 1;
                // It can have been told of, too, just before.
                std::thread::sleep(Duration::from_millis(20));
            } else {
                let mut intrusion = None;
                wait_until(&format!("{round} to be noticed"), || {
                    intrusion = told.try_recv().ok();
                    intrusion.is_some()
                });
                assert_eq!(intrusion.map(|intrusion| intrusion.changes), Some(1));
                heard += 1;
            }
            while told.try_recv().is_ok() {}
            if heard > 5 && unheard > 5 {
                break;
            }
        }
        assert!(heard > 5 && unheard > 5, "{heard} {unheard}");
        eprintln!("{heard} told of, {unheard} noticed by the generation");
    });
}
