//! Any bytes as a manifest: whatever it says is made a table of, or complained of in one line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nftproxy::model::{Family, NodeFacts};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::text;
use nftproxy::reconcile::Proxy;
use nftproxy::settings::Settings;
use nftproxy::state::State;
use nftproxy::watch::manifests::Manifests;

fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("nftproxy-fuzz-{}.yaml", std::process::id()));
    std::fs::write(&path, bytes).expect("the temporary folder can be written to");
    let (events, problems) = Manifests::new(path, "node-1".into()).read().expect("it is there");
    for problem in problems {
        assert!(!problem.to_string().contains('\n'), "{problem}");
    }
    let state = State::new(Settings::default(), NodeFacts::default());
    let mut proxy = Proxy::new(state, FakeKernel::default());
    events.into_iter().for_each(|event| proxy.observe(event));
    assert_eq!(proxy.commit().expect("the kernel takes it").set_aside, 0);
    let wanted = proxy.wanted();
    for family in Family::BOTH {
        drop(text::table(&wanted, family));
    }
});
