"""The event bus on RabbitMQ, with a client on pamqp or aio-pika's; `RabbitMQBus` is its public name."""

from tidings.buses.rabbitmq.bus import RabbitMQBus

__all__ = ["RabbitMQBus"]
