//! A process that listens dies, and another one takes its address.
#![allow(clippy::unwrap_used, reason = "tests")]

use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{
    Identity, TransportConfig, TransportError, connect, connection_error, server_endpoint,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::runtime::Runtime;

/// A listener in a runtime of its own, which accepts all and answers nothing.
fn listen(at: SocketAddr, identity: &Identity) -> (Runtime, SocketAddr) {
    let runtime = Runtime::new().unwrap();
    let inside = runtime.enter();
    let endpoint = server_endpoint(at, identity, &TransportConfig::default()).unwrap();
    let address = endpoint.local_addr().unwrap();
    drop(inside);
    runtime.spawn(async move {
        let mut held = Vec::new();
        while let Some(incoming) = endpoint.accept().await {
            held.push(incoming.await);
        }
    });
    (runtime, address)
}

#[test]
fn whoever_comes_after_a_dead_process_says_that_its_connections_are_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let certs = make_job_certs(dir.path(), &CertRequest::new("job", &[], 2)).unwrap();
    let shard = Identity::load(&certs.shard).unwrap();
    let worker = Identity::load(&certs.worker).unwrap();
    let (first, address) = listen("127.0.0.1:0".parse().unwrap(), &shard);
    let runtime = Runtime::new().unwrap();
    let config = TransportConfig::default();
    let shown = address.to_string();
    let dialled = connect(&shown, &worker, &config);
    let connection = runtime.block_on(dialled).unwrap();
    // As with a process that is killed, nothing is said.
    first.shutdown_timeout(Duration::from_secs(9));
    let (_second, same) = listen(address, &shard);
    assert_eq!(same, address);
    let end = runtime.block_on(connection.closed());
    let error = connection_error("the shard", &end);
    assert!(matches!(error, TransportError::Reset { .. }), "{error:?}");
}
