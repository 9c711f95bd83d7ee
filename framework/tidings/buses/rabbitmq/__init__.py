"""The event bus on RabbitMQ, over AMQP 0-9-1.

Internal: `tidings.settings` opens it by URL. It moves messages and knows their headers; it decodes no event, and
decides nothing about delivery.
"""
