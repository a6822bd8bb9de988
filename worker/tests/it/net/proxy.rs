//! A UDP forwarder between workers and a shard, which can lose everything for a while or lead elsewhere.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a thread may not notice that the proxy has changed.
const LOOK: Duration = Duration::from_millis(20);

pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

struct State {
    target: Mutex<SocketAddr>,
    cut: AtomicBool,
    stop: AtomicBool,
}

impl Proxy {
    pub fn to(target: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        front.set_read_timeout(Some(LOOK)).unwrap();
        let state = Arc::new(State {
            target: Mutex::new(target),
            cut: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        Self {
            address: front.local_addr().unwrap(),
            thread: Some({
                let state = Arc::clone(&state);
                std::thread::spawn(move || state.forward(&front))
            }),
            state,
        }
    }

    /// From here on nothing passes, in either direction.
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
    }

    pub fn mend(&self) {
        self.state.cut.store(false, Ordering::SeqCst);
    }

    /// From here on another shard stands behind the address.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap() = target;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl State {
    fn forward(self: Arc<Self>, front: &UdpSocket) {
        let mut backs: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
        let mut threads = Vec::new();
        let mut datagram = vec![0; 1 << 16];
        while !self.stop.load(Ordering::SeqCst) {
            let Ok((bytes, client)) = front.recv_from(&mut datagram) else {
                continue;
            };
            if self.cut.load(Ordering::SeqCst) {
                continue;
            }
            let back = backs.entry(client).or_insert_with(|| {
                let back = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
                back.set_read_timeout(Some(LOOK)).unwrap();
                let (state, own) = (Arc::clone(&self), Arc::clone(&back));
                let front = front.try_clone().unwrap();
                threads.push(std::thread::spawn(move || state.back(&own, &front, client)));
                back
            });
            let target = *self.target.lock().unwrap();
            // A shard that is gone: ICMP says so on the next call.
            let _gone = back.send_to(&datagram[..bytes], target);
        }
        for thread in threads {
            thread.join().unwrap();
        }
    }

    fn back(&self, back: &UdpSocket, front: &UdpSocket, client: SocketAddr) {
        let mut datagram = vec![0; 1 << 16];
        while !self.stop.load(Ordering::SeqCst) {
            let Ok((bytes, from)) = back.recv_from(&mut datagram) else {
                continue;
            };
            let current = *self.target.lock().unwrap() == from;
            if current && !self.cut.load(Ordering::SeqCst) {
                let _gone = front.send_to(&datagram[..bytes], client);
            }
        }
    }
}
